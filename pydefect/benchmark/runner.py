"""Runs the pairs of a benchmark, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydefect.benchmark.plan import Category, Pair, Variant, Weights
from pydefect.benchmark.results import FAILED, FINISHED, Results
from pydefect.benchmark.worker import Job
from pydefect.detector import resolve_device
from pydefect.errors import InputError
from pydefect.persistence import alone_in, write_atomically
from pydefect.places import check_writable
from pydefect.run import is_run

__all__ = ["run_benchmark"]

RESULTS, RUNS = "results.jsonl", "runs"
_POLL_SECONDS = 0.05
# What a fit that is interrupted gets to end its step and save it.
_SECONDS_TO_SAVE = 20.0
# Not ``-m``: with it Python looks for the package in the current folder first, and in a checkout would find
# sources without their native libraries. Settings may name files relative to that folder, so it stays.
_WORKER = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
from pydefect.benchmark.worker import main
main(*sys.argv[1:])
"""


@dataclass(frozen=True)
class _Running:
    """A pair whose process has been started."""

    pair: Pair
    process: subprocess.Popen[bytes]
    work: Path
    log: Path


def run_benchmark(
    variants: Sequence[Variant],
    categories: Sequence[Category],
    out: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] = "imagenet",
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    batch_size: int = 8,
    jobs: int = 1,
    threads: int | None = None,
    keep_maps: bool = False,
    best_epoch: bool = False,
    on_row: Callable[[dict[str, Any], int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Fit and measure every variant on every category with every seed.

    Every pair runs in a process of its own. What is finished in `out` already, with equal settings, weights,
    seed and data (by content), is not repeated; an interrupted fit goes on from its checkpoint. A pair that
    fails is recorded, does not stop the others, and is tried again by the next call.

    ::

        out/results.jsonl    a line a pair: figures, configuration, versions, times, memory, or the failure
        out/runs/...         scores and maps (keep_maps), for ``pydefect report``
        out/work/...         checkpoints of unfinished fits, and logs of failed ones

    Parameters
    ----------
    variants, categories
        Rows and columns of the table.
    out
        Folder, made when missing.
    weights
        See :func:`pydefect.fit`.
    seeds
        One fit each.
    device, batch_size
        See :func:`pydefect.fit` and :func:`pydefect.evaluate`.
    jobs
        Processes at once. Times and, to a degree, memory are fair with one only.
    threads
        Of each process; None: all cores over `jobs`.
    keep_maps
        Keep a run folder of every pair, written by the evaluation that the figures are from. A finished pair
        without one is repeated.
    best_epoch
        Also fit with every smaller number of epochs and record the best figures, chosen on the test set: an
        upper bound that other papers report, and no estimate of what a user gets. For methods that train in
        epochs; the work grows with the square of their number.
    on_row
        Called with every new row, the number of new rows so far, and of those to come in all.

    Returns
    -------
    list of dict
        The rows of these pairs, as ``results.jsonl`` holds them, failures included.

    Raises
    ------
    InputError
        An argument is not allowed, or another program is at work in `out`, before any work.
    """
    for name, values in (("variants", variants), ("categories", categories), ("seeds", seeds)):
        if not values:
            raise InputError(f"{name}: none given; at least one is needed")
    labels = [variant.label for variant in variants]
    if len(set(labels)) < len(labels):
        raise InputError(f"variants: labels must differ; given are {', '.join(labels)}")
    for name, value in (("jobs", jobs), ("batch_size", batch_size), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: {value!r} given; allowed are whole numbers from 1 on")
    resolve_device(device)
    folder = Path(out)
    check_writable(folder, "out")
    backbone_weights = Weights(os.fspath(weights))
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, "out"):
        results = Results(folder / RESULTS)
        pairs = [
            Pair(variant, category, seed, backbone_weights, device)
            for category in categories
            for seed in seeds
            for variant in variants
        ]

        def run_folder(pair: Pair) -> Path:
            return folder / RUNS / pair.place

        def is_finished(pair: Pair) -> bool:
            row = results.finished(pair.key, best_epoch=best_epoch)
            return row is not None and (not keep_maps or is_run(run_folder(pair)))

        waiting = {pair.key: pair for pair in reversed(pairs) if not is_finished(pair)}
        queue = list(waiting.values())
        if threads is None:
            threads = max(1, (os.cpu_count() or 1) // jobs)

        def start(pair: Pair) -> _Running:
            work = folder / "work" / pair.place
            job = Job(
                root=str(pair.category.dataset.root.absolute()),
                method=pair.variant.method,
                preset=pair.variant.preset,
                settings=dict(pair.variant.settings),
                weights=pair.weights.source,
                seed=pair.seed,
                device=device,
                batch_size=batch_size,
                checkpoint=str(work / "checkpoint"),
                run=str(run_folder(pair)) if keep_maps else None,
                best_epoch=best_epoch,
                threads=threads,
            )
            write_atomically(work / "job.json", json.dumps(asdict(job)).encode())
            log = work / "log.txt"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        _WORKER,
                        work / "job.json",
                        work / "result.json",
                        str(os.getpid()),
                    ],
                    stdout=file,
                    stderr=file,
                    stdin=subprocess.DEVNULL,
                    # OpenMP reads it when it is loaded; more threads than cores wait for each other.
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    # Ctrl-C in the terminal is for this process, which then ends the others.
                    start_new_session=True,
                )
            return _Running(pair, process, work, log)

        def finish(running: _Running) -> dict[str, Any]:
            row = {"key": running.pair.key, "label": running.pair.variant.label, **running.pair.facts}
            result = running.work / "result.json"
            if running.process.returncode == 0 and result.exists():
                row |= {"status": FINISHED, **json.loads(result.read_text(encoding="utf-8"))}
            else:
                row |= {"status": FAILED, "error": _reason(running.process.returncode, running.log)}
            row["layout"] = running.pair.category.dataset.layout
            results.add(row)
            if row["status"] == FINISHED:
                shutil.rmtree(running.work)
            return row

        done, total = 0, len(queue)
        at_work: list[_Running] = []
        try:
            while queue or at_work:
                while queue and len(at_work) < jobs:
                    at_work.append(start(queue.pop()))
                for running in [one for one in at_work if one.process.poll() is not None]:
                    at_work.remove(running)
                    row = finish(running)
                    done += 1
                    if on_row is not None:
                        on_row(row, done, total)
                time.sleep(_POLL_SECONDS)
        finally:
            _end([running.process for running in at_work])
        return [{**results.row(pair.key), "label": pair.variant.label} for pair in pairs]


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let every fit end its step and save it; end what goes on after that, or at a second Ctrl-C."""
    deadline = time.monotonic() + _SECONDS_TO_SAVE
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _reason(code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"
