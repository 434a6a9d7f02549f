"""The benchmarks' tables: ratios, shares of a limit, targets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "benchmarks" / "table.py"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("benchmark_table", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def bench(contender, q1, median, q3, group="knn 25088x784x448 cpu", **extra):
    return {
        "group": group,
        "name": f"bench_knn[cpu-25088-{contender}]",
        "param": f"cpu-25088-{contender}",
        "stats": {"min": q1, "q1": q1, "median": median, "q3": q3, "max": q3, "rounds": 7},
        "extra_info": {"threads": 2, "peak_mib": 1.0, **extra},
    }


@pytest.fixture
def run():
    return {
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {
            "node": "somebody's machine",
            "cpu": {"brand_raw": "a processor", "flags": []},
            "limits": {"2": {"float32_gflops": 500.0, "bf16_gflops": 1000.0, "copy_gbs": 50.0}},
        },
        "benchmarks": [
            bench("pydefect", 0.9, 1.0, 1.25, flops=250e9, traffic=10e9),
            bench("pydefect bf16", 0.5, 0.5, 0.5, flops=250e9, traffic=10e9, precision="bf16"),
            bench("faiss", 1.8, 2.0, 2.25, flops=5e9, traffic=50e9),
            bench("reference", 10.0, 10.0, 10.0),
        ],
    }


def test_contenders_are_named_after_what_tells_them_apart(table, run):
    table.name_contenders(run["benchmarks"])
    assert [one["extra_info"]["contender"] for one in run["benchmarks"]] == [
        "pydefect",
        "pydefect bf16",
        "faiss",
        "reference",
    ]


def test_ratios_and_shares(table, run):
    table.name_contenders(run["benchmarks"])
    rows = {row[2]: row for row in table.result_rows(table.measurements(run))}
    # 250 * 10^9 operations at 500 * 10^9 a second are half of the second taken.
    assert rows["pydefect"][3:] == ["1000", "±17.5 %", "", "10 (8 to 11.1)", "1.0", "50 % float32"]
    assert rows["pydefect bf16"][-1] == "50 % bf16"
    assert rows["faiss"][5:] == ["2 (1.44 to 2.5)", "5 (4.44 to 5.56)", "1.0", "50 % copy"]
    assert rows["reference"][-1] == ""


def test_targets(table, run):
    table.name_contenders(run["benchmarks"])
    rows = [row for row in table.target_rows(table.measurements(run)) if row[0].startswith("knn 25088")]
    assert [row[-1] for row in rows] == ["met", "not measured", "met"]
    run["benchmarks"][2]["stats"]["median"] = 1.4
    rows = [row for row in table.target_rows(table.measurements(run)) if row[0].startswith("knn 25088")]
    assert rows[0][-1] == "**missed**"


def test_what_is_kept_names_no_machine(table, run):
    table.name_contenders(run["benchmarks"])
    kept = table.trimmed(run)
    assert "somebody" not in str(kept)
    assert kept["machine_info"]["cpu"] == "a processor"
    assert table.markdown_of([kept]) == table.markdown_of([run])


def test_a_group_is_taken_from_the_last_run_that_holds_it(table):
    def run(day: str, *groups: str) -> dict:
        benchmarks = [{"group": group, "extra_info": {"threads": 2}, "day": day} for group in groups]
        return {"datetime": day, "benchmarks": benchmarks}

    kept = table.latest([run("1", "a"), run("2", "b", "b", "c"), run("3", "a", "c")])
    assert [one["datetime"] for one in kept] == ["2", "3"]
    assert [[bench["group"] for bench in one["benchmarks"]] for one in kept] == [["b", "b"], ["a", "c"]]


def test_runs_of_one_machine_and_day_share_a_line_with_the_range_of_their_limits(table):
    def run(hour: int, gflops: float, cpu: str = "a processor") -> dict:
        limits = {"2": {"float32_gflops": gflops, "bf16_gflops": 0.0, "copy_gbs": 30.2}}
        machine = {"cpu": cpu, "cores": 2, "versions": {"a": "1", f"b{hour}": "2"}, "limits": limits}
        return {"datetime": f"2026-01-01T0{hour}", "machine_info": {**machine, "taken_by_others": hour / 10}}

    lines = table.machine_lines([run(1, 231.4), run(2, 235.2), run(3, 500, "another")])
    assert lines == [
        "- 2026-01-01: a processor, 2 cores; a 1, b1 2, b2 2. Limits: 2 threads: 231 to 235 GFLOP/s float32, "
        "no bf16, 30 GB/s copy. Other processes kept at most 0.2 cores busy.",
        "- 2026-01-01: another, 2 cores; a 1, b3 2. Limits: 2 threads: 500 GFLOP/s float32, "
        "no bf16, 30 GB/s copy. Other processes kept at most 0.3 cores busy.",
    ]


@pytest.mark.slow
def test_a_benchmark_runs_and_ends_with_its_table(tmp_path):
    """The documented command on the smallest of them: the table is printed after the last measurement."""
    benchmark = SOURCE.parent / "bench_hypersphere.py"
    command = [sys.executable, "-m", "pytest", str(benchmark), "-k", "cpu-6272 and not reference"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=tmp_path,  # in the source folder Python would take the sources, which are not compiled
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 thread: " in done.stdout
    assert "cdist+topk+gather" in done.stdout.rpartition("against rivals")[2]
