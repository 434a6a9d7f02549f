"""The table of a benchmark run: against rivals, against the machine's limits, against the targets.

    pytest benchmarks --benchmark-json=results.json
    python benchmarks/table.py results.json --keep benchmarks/results/cpu-DATE.json \\
        --update benchmarks/README.md

takes the results of pytest-benchmark and of ``end_to_end.py``, several files at once; prints the tables,
keeps what they are made of in one small file, and writes them into the README between its two markers. A
group that several files hold is taken from the last of them, so what was kept can be brought up to date by a
run of a few groups: ``table.py benchmarks/results/cpu-DATE.json few.json --keep ...``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

OURS, REFERENCE = "pydefect", "reference"


@dataclass(frozen=True)
class Measurement:
    """One contender's figures in one group."""

    group: str
    contender: str
    threads: int
    seconds: tuple[float, float, float]
    """First quartile, median and third quartile of the rounds."""
    peak_mib: float | None
    limit_seconds: float
    """What the task takes where nothing but a limit of the machine holds it up; 0: not known."""
    limit: str
    """Which limit that is."""
    note: str = ""

    @property
    def median(self) -> float:
        return self.seconds[1]


@dataclass(frozen=True)
class Ratio:
    """How many times a figure is another one, between the quartiles that are farthest apart."""

    value: float
    low: float
    high: float

    @classmethod
    def of_times(cls, above: Measurement, below: Measurement) -> Ratio:
        (a1, a2, a3), (b1, b2, b3) = above.seconds, below.seconds
        return cls(a2 / b2, a1 / b3, a3 / b1)

    def __str__(self) -> str:
        if f"{self.low:.2g}" == f"{self.high:.2g}":
            return _short(self.value)
        return f"{_short(self.value)} ({_short(self.low)} to {_short(self.high)})"


@dataclass(frozen=True)
class Target:
    """What one figure is to reach on two threads.

    ``ours`` and ``rival`` are patterns of contenders in the groups that match ``group``. "time" and "memory"
    want the rival's figure to be at least ``wanted`` times ours; "MiB" wants ours to be at most ``wanted``.
    """

    group: str
    rival: str
    wanted: float
    quantity: Literal["time", "memory", "MiB"] = "time"
    ours: str = OURS


TARGETS = (
    Target("knn 25088x784x448 *", "faiss*", 1.5),
    Target("knn 25088x784x448 *", "cdist*", 2.5),
    Target("knn 25088x784x448 *", "faiss*", 2.5, ours="pydefect bf16"),
    Target("knn 3136x784x112 *", "faiss*", 1.5),
    Target("knn 3136x784x112 *", "cdist*", 2.5),
    Target("knn 3136x784x112 *", "faiss*", 2.5, ours="pydefect bf16"),
    Target("assign_unique *", "matrix+python", 20),
    Target("bank of 784 *", "backbone", 2, ours="kcenter"),
    Target("bank of 784 *", "backbone", 2, ours="kmeans"),
    Target("bank of 784 *", "backbone", 2, ours="ema"),
    Target("kcenter_reduce *", "product", 10),
    # What anomalib does at every step, where it takes less than minutes.
    Target("kcenter_greedy 163 of *", "norm", 5),
    Target("relaxed_contrastive 6272x448 *", REFERENCE, 4),
    Target("relaxed_contrastive 6272x448 *", REFERENCE, 20, "memory"),
    Target("relaxed_contrastive 25088x448 *", "", 1024, "MiB"),
    Target("hypersphere *", REFERENCE, 2),
    Target("project_levels *", REFERENCE, 3),
    Target("project_levels *", REFERENCE, 5, "memory"),
    Target("convolution *", "oneDNN", 2),
    Target("convolution_weight_gradient *", "PyTorch", 2),
    Target("relu_avg_pool *", REFERENCE, 1),
    Target("score_maps *", REFERENCE, 2),
    Target("spatial_reunion *", REFERENCE, 2),
    Target("spatial_module *", REFERENCE, 2),
    Target("channel_reunion *", REFERENCE, 2),
    Target("selective_fusion *", REFERENCE, 2),
    Target("score resnet18 batch 1 *", "CFA", 4, ours="pydefect float32"),
    Target("score resnet18 batch 8 *", "CFA", 4, ours="pydefect float32"),
    Target("score resnet18 batch 1 *", "CFA", 6, ours="pydefect bfloat16"),
    Target("score resnet18 batch 8 *", "CFA", 6, ours="pydefect bfloat16"),
    Target("score resnet18 batch 1 *", "PatchCore", 4, ours="pydefect float32"),
    Target("score resnet18 batch 8 *", "PatchCore", 4, ours="pydefect float32"),
    Target("score wide_resnet50_2 batch 1 *", "CFA", 3, ours="pydefect float32"),
    Target("score wide_resnet50_2 batch 1 *", "CFA", 5, ours="pydefect bfloat16"),
    Target("score wide_resnet50_2 batch 1 *", "PatchCore", 3, ours="pydefect float32"),
    Target("fit resnet18 30 epochs *", "CFA*", 5),
    Target("dual_ae step cpu", "EfficientAD-S*", 1.5, ours="pydefect dual_ae float32"),
    Target("dual_ae step cpu", "EfficientAD-S*", 2, ours="pydefect dual_ae bfloat16"),
    Target("dual_ae score batch 1 *", "EfficientAD-S*", 2, ours="pydefect dual_ae float32"),
    Target("dual_ae score batch 8 *", "EfficientAD-S*", 2, ours="pydefect dual_ae float32"),
    Target("dual_ae score batch 1 *", "EfficientAD-S*", 1.8, ours="pydefect dual_ae bfloat16"),
    Target("dual_ae score batch 8 *", "EfficientAD-S*", 1.8, ours="pydefect dual_ae bfloat16"),
    Target("dual_ae muon *", REFERENCE, 1),
    Target("dual_ae pdn *", REFERENCE, 1),
    Target("auroc 100x1024x1024 *", "scikit-learn*", 10),
    Target("aupro 100x1024x1024 *", "anomalib*", 20),
)


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _limit(extra: Mapping[str, Any], limits: Mapping[str, Any]) -> tuple[float, str]:
    at = limits.get(str(extra.get("threads")))
    if at is None or not (extra.get("flops") or extra.get("traffic")):
        return 0.0, ""
    precision = extra.get("precision", "float32")
    # A machine without bf16 instructions is held to its float32.
    peak = at[f"{precision}_gflops"] or at["float32_gflops"]
    return max(
        (extra.get("flops", 0) / peak * 1e-9, precision),
        (extra.get("traffic", 0) / at["copy_gbs"] * 1e-9, "copy"),
    )


def measurements(run: Mapping[str, Any]) -> list[Measurement]:
    """Read a run as pytest-benchmark writes it."""
    limits = run["machine_info"].get("limits", {})
    found = []
    for bench in run["benchmarks"]:
        extra, stats = bench["extra_info"], bench["stats"]
        seconds, name = _limit(extra, limits if "cuda" not in bench["group"] else {})
        found.append(
            Measurement(
                bench["group"],
                extra.get("contender") or bench["name"],
                extra["threads"],
                (stats["q1"], stats["median"], stats["q3"]),
                extra.get("peak_mib"),
                seconds,
                name,
                extra.get("note", ""),
            )
        )
    return found


def name_contenders(benchmarks: Iterable[dict[str, Any]]) -> None:
    """Give those that did not say who they are the part of their name that no other of their group shares."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for bench in benchmarks:
        groups.setdefault(bench["group"], []).append(bench)
    for members in groups.values():
        unnamed = [member for member in members if not member["extra_info"].get("contender")]
        parts = [(member.get("param") or member["name"]).split("-") for member in unnamed]
        shared = [0, 0]
        for side, direction in enumerate((1, -1)):
            columns = zip(*(part[::direction] for part in parts), strict=False)
            for column in columns:
                if len(set(column)) > 1 or len(parts) == 1:
                    break
                shared[side] += 1
        for member, part in zip(unnamed, parts, strict=True):
            own = part[shared[0] : len(part) - shared[1]]
            if len(members) == 1:  # nobody to tell it from: it is pydefect where its name says so
                own = [word for word in part if word.startswith(OURS)]
            member["extra_info"]["contender"] = "-".join(own or part)


def _one(found: Sequence[Measurement], pattern: str) -> Measurement | None:
    matching = [one for one in found if fnmatch(one.contender, pattern)]
    return matching[0] if matching else None


def _by_group(found: Iterable[Measurement]) -> dict[tuple[str, int], list[Measurement]]:
    groups: dict[tuple[str, int], list[Measurement]] = {}
    for one in found:
        groups.setdefault((one.group, one.threads), []).append(one)
    return groups


def result_rows(found: Iterable[Measurement]) -> list[list[str]]:
    """One row a contender; the first row holds the headings."""
    rows = [
        [
            "what",
            "threads",
            "contender",
            "median ms",
            "spread",
            "time / ours",
            "reference / it",
            "peak MiB",
            "of limit",
        ]
    ]
    for (group, threads), members in _by_group(found).items():
        ours = _one(members, OURS) or _one(members, f"{OURS}*")
        reference = _one(members, REFERENCE)
        for one in members:
            low, median, high = one.seconds
            rows.append(
                [
                    group,
                    str(threads),
                    one.contender + (f" ({one.note})" if one.note else ""),
                    _short(1e3 * median),
                    f"±{50 * (high - low) / median:.1f} %",
                    "" if ours in (None, one) else str(Ratio.of_times(one, ours)),
                    "" if reference in (None, one) else str(Ratio.of_times(reference, one)),
                    "" if one.peak_mib is None else f"{one.peak_mib:.1f}",
                    f"{100 * one.limit_seconds / median:.0f} % {one.limit}" if one.limit_seconds else "",
                ]
            )
    return rows


def target_rows(found: Iterable[Measurement], threads: int = 2) -> list[list[str]]:
    """One row a target and group; the first row holds the headings."""
    rows = [["what", "ours", "against", "wanted", "measured", ""]]
    groups = _by_group(found)
    for target in TARGETS:
        wanted = (
            f"at most {target.wanted:g} MiB"
            if target.quantity == "MiB"
            else f"{target.quantity} / {target.wanted:g}"
        )
        measured = []
        for (group, at), members in groups.items():
            if at != threads or not fnmatch(group, target.group):
                continue
            ours, rival = _one(members, target.ours), _one(members, target.rival)
            if ours is None or (rival is None and target.quantity != "MiB"):
                continue
            figure, met = _compare(target, ours, rival)
            measured.append(
                [
                    group,
                    ours.contender,
                    target.rival and rival.contender,
                    wanted,
                    figure,
                    "met" if met else "**missed**",
                ]
            )
        name = target.group.removesuffix(" *")
        rows += measured or [[name, target.ours, target.rival, wanted, "", "not measured"]]
    return rows


def _compare(target: Target, ours: Measurement, rival: Measurement | None) -> tuple[str, bool]:
    if target.quantity == "MiB":
        return f"{ours.peak_mib} MiB", ours.peak_mib is not None and ours.peak_mib <= target.wanted
    if target.quantity == "time":
        ratio = Ratio.of_times(rival, ours)
        return str(ratio), ratio.value >= target.wanted
    if ours.peak_mib is None or rival.peak_mib is None:
        return "no peak memory", False
    # A call that takes no page of its own is measured as 0.
    quotient = rival.peak_mib / max(ours.peak_mib, 0.1)
    return _short(quotient), quotient >= target.wanted


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table for the README."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_lines(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the runs of one day and machine ran on, in one line, with the range of what was reached."""
    together: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        machine = run["machine_info"]
        key = (run["datetime"][:10], machine["cpu"], str(machine.get("cores", "?")))
        together.setdefault(key, []).append(machine)
    lines = []
    for (day, cpu, cores), machines in together.items():
        versions = {name: version for one in machines for name, version in one.get("versions", {}).items()}
        taken = max(one.get("taken_by_others", 0) for one in machines)
        lines.append(
            f"- {day}: {cpu}, {cores} cores; {', '.join(map(' '.join, versions.items()))}. "
            f"Limits: {limits_line([one.get('limits', {}) for one in machines])}. "
            f"Other processes kept at most {taken} cores busy."
        )
    return lines


def limits_line(limits: Sequence[Mapping[str, Any]]) -> str:
    """What the machine reached in several runs, for every number of threads in use."""
    parts = []
    for threads in sorted({threads for one in limits for threads in one}, key=int):
        at = [one[threads] for one in limits if threads in one]
        parts.append(
            f"{threads} {'thread' if threads == '1' else 'threads'}: "
            f"{_range(at, 'float32_gflops')} GFLOP/s float32, "
            + (f"{_range(at, 'bf16_gflops')} GFLOP/s bf16, " if at[0]["bf16_gflops"] else "no bf16, ")
            + f"{_range(at, 'copy_gbs')} GB/s copy"
        )
    return "; ".join(parts)


def _range(found: Sequence[Mapping[str, float]], name: str) -> str:
    low, high = (f"{pick(one[name] for one in found):.0f}" for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def trimmed(run: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the tables need and what tells machine and versions; no host name, no single rounds."""
    machine = run["machine_info"]
    cpu = machine.get("cpu", {})
    return {
        "datetime": run["datetime"],
        "machine_info": {
            "cpu": cpu if isinstance(cpu, str) else _cpu_name(cpu),
            **{
                name: machine[name]
                for name in ("cores", "taken_by_others", "system", "versions", "limits")
                if name in machine
            },
        },
        "benchmarks": [
            {
                "group": bench["group"],
                "name": bench["name"],
                "stats": {
                    name: float(f"{bench['stats'][name]:.6g}")
                    for name in ("min", "q1", "median", "q3", "max", "rounds")
                },
                "extra_info": bench["extra_info"],
            }
            for bench in run["benchmarks"]
        ],
    }


def _cpu_name(found: Mapping[str, Any]) -> str:
    """As benchmarks/machine.py names it, from what pytest-benchmark knows."""
    name = str(found.get("brand_raw", ""))
    return (
        f"{name} (family {found['family']}, model {found.get('model', '?')})" if "family" in found else name
    )


def _read(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text())
    runs: list[dict[str, Any]] = content.get("runs", [content])
    for run in runs:
        name_contenders(run["benchmarks"])
    return runs


def latest(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave every group to the last run that holds it; a run that is left without any goes."""
    seen: set[tuple[str, int]] = set()
    kept = []
    for run in reversed(runs):
        groups = {(bench["group"], bench["extra_info"]["threads"]) for bench in run["benchmarks"]}
        own = [
            bench
            for bench in run["benchmarks"]
            if (bench["group"], bench["extra_info"]["threads"]) in groups - seen
        ]
        seen |= groups
        if own:
            kept.append(run | {"benchmarks": own})
    return kept[::-1]


def markdown_of(runs: Sequence[Mapping[str, Any]]) -> str:
    """Everything between the README's markers."""
    found = [one for run in runs for one in measurements(run)]
    targets = target_rows(found)
    missed = [row for row in targets[1:] if row[-1] != "met"]
    verdict = f"{len(targets) - 1 - len(missed)} of {len(targets) - 1} met."
    return "\n\n".join(
        [
            "\n".join(machine_lines(map(trimmed, runs))),
            "### Targets, on two threads",
            verdict,
            as_markdown(targets),
            "### All figures",
            as_markdown(result_rows(found)),
        ]
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, help="write what the tables are made of to this file")
    parser.add_argument("--update", type=Path, help="write the tables into this file, between its markers")
    arguments = parser.parse_args()
    runs = latest([run for path in arguments.results for run in _read(path)])
    found = [one for run in runs for one in measurements(run)]
    print(as_text(result_rows(found)), as_text(target_rows(found)), sep="\n\n")
    if arguments.keep:
        arguments.keep.parent.mkdir(parents=True, exist_ok=True)
        arguments.keep.write_text(json.dumps({"runs": [trimmed(run) for run in runs]}, indent=1) + "\n")
    if arguments.update:
        text = arguments.update.read_text()
        if BEGIN not in text or END not in text:
            parser.error(f"{arguments.update} has no line {BEGIN} and {END}")
        between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
        new = f"{BEGIN}\n\n{markdown_of(runs)}\n\n{END}"
        arguments.update.write_text(between.sub(lambda _: new, text))


if __name__ == "__main__":
    main()
