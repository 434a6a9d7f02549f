"""Build, check and time everything on a CUDA card, in one command of under eight minutes.

    python benchmarks/gpu.py --out gpu.json --build build/gpu

In a bare copy of the repository, with PyTorch, nvcc, CMake and ninja on the machine and nothing installed:
``--build FOLDER`` compiles the package for this card into FOLDER and goes on from there; without it the
installed package is used. The steps, skipped with a word about it where the time is gone:

1. the build;
2. the tests marked gpu, in several processes; what fails is listed and does not end the run;
3. the card's limits: copy bandwidth, matrix products in float32, TF32 and bfloat16;
4. every operation against its twin, eager and compiled, results compared before anything is timed;
5. training steps of the dual autoencoder, eager and captured in a CUDA graph;
6. whole paths: images a second of scores, in a CUDA graph too, and of a fit; its peak memory at batches of
   2, 8 and 32.

Times are medians of CUDA events over single calls with the L2 cache flushed in between: of calls as Python
makes them, launches included, and, where a CUDA graph can capture them, of its replays, which is what the
card itself takes. The JSON holds everything, the table printed last what the targets say. Weights are random,
which takes the same time as trained ones. Operations are compared with twins in float32; whole paths run with
PyTorch's own settings.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 15
_TEST_PROCESSES = 8
# The `dependencies` in pyproject.toml, which the build leaves to the machine.
MODULES = ["cv2", "jinja2", "matplotlib", "natsort", "safetensors", "scipy", "tqdm", "typer"]
TEST_MODULES = ["hypothesis", "pytest"]
# Rooms of tests marked gpu.
ROOMS = ["ops", "dual_ae", "conpatch", "test_cuda_graphs.py", "test_randomness.py"]
Call = Callable[[], Any]


class Clock:
    """The command's own time, a part of which its building process may have used."""

    def __init__(self) -> None:
        self.began = time.monotonic() - float(os.environ.get("PYDEFECT_BENCHMARK_USED", 0))
        self.limit = 470.0

    def used(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Seconds until it has to be done."""
        return self.limit - self.used()


clock = Clock()


def say(text: str) -> None:
    print(f"[{clock.used():5.0f} s] {text}", flush=True)


# --- Build and tests, in processes of their own ------------------------------------------------------------


def build(folder: Path) -> dict[str, Any]:
    """Compile the package for this machine's card into a folder that can stand on PYTHONPATH."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    started = time.monotonic()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--upgrade", "--target", str(folder), "-C", "cmake.define.PYDEFECT_CUDA=ON"]
    command += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={major}{minor}-real", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], stdout=subprocess.PIPE, text=True)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "arch": f"sm_{major}{minor}",
        # The package says so too, if it works.
        "compiler": compiler.stdout.partition("\n")[0],
        "pybind11": version("pybind11"),
    }


def run_tests(seconds: float) -> dict[str, Any]:
    """The tests on the card, a share of them in each of several processes; what failed, and the counts."""
    shares = max(1, min(_TEST_PROCESSES, (os.cpu_count() or 1) - 1))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-m", "gpu"]
    command += [str(ROOT / "tests" / room) for room in ROOMS]
    folder = Path(tempfile.mkdtemp())
    logs = [folder / f"{share}.log" for share in range(shares)]
    running = []
    for share, log in enumerate(logs):
        environment = {**os.environ, "PYDEFECT_TEST_SHARE": f"{share}/{shares}"}
        # Not in the source folder, which Python would put in front of the package.
        with log.open("w") as file:
            running.append(
                subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment)
            )
    began, ended = time.monotonic(), "in time"
    for process in running:
        try:
            process.wait(max(0.0, seconds - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
            process.kill()
            process.wait()
    counts = dict.fromkeys(("passed", "failed", "error", "errors", "skipped"), 0)
    failed, kept = [], []
    for process, log in zip(running, logs, strict=True):
        lines = log.read_text().splitlines()
        closing = lines[-1] if lines else ""
        for number, what in re.findall(r"(\d+) (\w+)", closing):
            counts[what] = counts.get(what, 0) + int(number)
        failed += [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if process.returncode:
            failed.append(f"share {log.stem} of {shares}: exit status {process.returncode}: {closing[:200]}")
            kept += lines[-400:]
    counts.pop("deselected", None)
    summary = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    return {"ended": ended, "failed": failed, "summary": summary, "processes": shares, "log": kept}


def installed() -> str:
    """What the package says of its build, asked in a process of its own, which may fail."""
    # Not `pydefect info`, which names folders too.
    command = [sys.executable, "-X", "faulthandler", "-c"]
    command += ["from pydefect.buildinfo import build_info; print(build_info())"]
    told = subprocess.run(command, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, text=True)
    if told.returncode == 0:
        return told.stdout.strip()
    return f"exit status {told.returncode}\n{where_it_crashes(command)}" if told.returncode < 0 else "failed"


def where_it_crashes(command: list[str]) -> str:
    """A debugger's view of a program that a signal ends; the machine it ends on may be gone tomorrow."""
    debugger = shutil.which("gdb") or shutil.which("cuda-gdb")
    if debugger is None:
        return "(no gdb or cuda-gdb to say where)"
    asked = ("run", "bt 40", "x/8i $pc", "info registers", "info sharedlibrary native|torch_python|stdc")
    steps = [word for step in asked for word in ("-ex", step)]
    try:
        seen = subprocess.run(
            [debugger, "--batch", *steps, "--args", *command],
            cwd=tempfile.gettempdir(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
        )
    except subprocess.TimeoutExpired:
        return f"({debugger} took too long to say where)"
    return seen.stdout[-20_000:]


# --- Measuring ---------------------------------------------------------------------------------------------


class Results:
    """What was measured: a row for every contender of a group, and the card's limits."""

    def __init__(self, rows: list[dict[str, Any]], limits: dict[str, float]) -> None:
        self.rows = rows
        self.limits = limits

    def ms(self, group: str, contender: str = "pydefect", *, device: bool = False) -> float | None:
        """Milliseconds as called, or on the card alone."""
        for row in self.rows:
            if row["group"] == group and row.get("contender") == contender:
                return on_the_card(row) if device else row.get("ms")
        return None


def on_the_card(row: dict[str, Any]) -> float | None:
    """A replayed graph's milliseconds, or where none was captured those of the kernels one by one."""
    if "device_ms" in row:
        return float(row["device_ms"])
    return row["kernels_us"] / 1e3 if "kernels_us" in row else None


class Bench(Results):
    """Times calls on the card and keeps the results."""

    def __init__(self, kernels: bool = False) -> None:
        import torch

        super().__init__([], {})
        self.torch = torch
        self._kernels = kernels
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def milliseconds(self, call: Call, rounds: int = ROUNDS) -> float:
        torch = self.torch
        for _ in range(3):
            call()
        times = []
        for _ in range(rounds):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def peak_mib(self, call: Call) -> float:
        torch = self.torch
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def measure_limits(self) -> None:
        """Bytes read and written a second of a large copy; operations a second of large products."""
        torch = self.torch
        source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        seconds = self.milliseconds(lambda: target.copy_(source)) / 1e3
        self.limits["copy GB/s"] = 2 * source.numel() / seconds / 1e9
        side = 8192
        for name, dtype, tf32 in (
            ("float32", torch.float32, False),
            ("tf32", torch.float32, True),
            ("bf16", torch.bfloat16, False),
        ):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
            self.limits[f"{name} TFLOP/s"] = 2 * side**3 / self.milliseconds(lambda a=a, b=b: a @ b, 5) / 1e9
        torch.backends.cuda.matmul.allow_tf32 = False
        # Three products of numbers of 11 bits make one as exact as float32's: of TF32 numbers, or of float16
        # ones, whose rate is bfloat16's; the kernels use the latter.
        self.limits["3xtf32 TFLOP/s"] = self.limits["tf32 TFLOP/s"] / 3
        self.limits["3xfloat16 TFLOP/s"] = self.limits["bf16 TFLOP/s"] / 3

    def group(
        self,
        name: str,
        contenders: dict[str, Call],
        *,
        flops: float = 0.0,
        traffic: float = 0.0,
        agree: Callable[[Any, Any], None] | None = None,
        rounds: int = ROUNDS,
        capture: bool = True,
    ) -> None:
        """Time everybody; "pydefect" and "reference" are compared before that."""
        if clock.left() < 30:
            say(f"{name}: no time left")
            self.rows.append({"group": name, "skipped": "no time left"})
            return
        bound = 1e3 * max(
            flops / self.limits["3xfloat16 TFLOP/s"] / 1e12, traffic / self.limits["copy GB/s"] / 1e9
        )
        agreement = "not compared"
        if agree is not None and "reference" in contenders:
            try:
                agree(contenders["pydefect"](), contenders["reference"]())
                agreement = "agrees"
            except AssertionError as error:
                agreement = f"DIFFERS: {str(error)[:300]}"
            except Exception as error:
                # A small card has no memory for a twin that a large one has room for.
                agreement = f"not compared: {type(error).__name__}"
                self.torch.cuda.empty_cache()
        for contender, call in contenders.items():
            row: dict[str, Any] = {"group": name, "contender": contender, "agreement": agreement}
            try:
                row["ms"] = self.milliseconds(call, rounds)
                row["peak_mib"] = self.peak_mib(call)
                row["bound_ms"] = bound
                graph = self.captured(call) if capture else None
                if graph is not None:
                    row["device_ms"] = self.milliseconds(graph.replay, rounds)
                if self._kernels:
                    # Of a twin that takes long and has thousands of kernels one call is enough.
                    row |= self.kernels_of(call, 5 if row["ms"] < 100 else 1)
            except Exception as error:
                # A contender that does not run (out of memory, a compiler's refusal) is a finding.
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
                self.torch.cuda.empty_cache()
            self.rows.append(row)
            took, alone = row.get("ms", float("nan")), on_the_card(row) or float("nan")
            say(
                f"{name:<44} {contender:<10} {took:9.3f} ms, {alone:9.3f} on the card  "
                f"{row.get('failed', agreement)}"
            )

    def kernels_of(self, call: Call, calls: int) -> dict[str, Any]:
        """Microseconds of a call's kernels by PyTorch's profiler: their sum, and the longest ones'."""
        torch = self.torch
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
        found = [
            (event.key, event.self_device_time_total / calls, event.count / calls)
            for event in profile.key_averages()
            if event.self_device_time_total > 0
        ]
        found.sort(key=lambda kernel: -kernel[1])
        return {"kernels_us": sum(us for _, us, _ in found), "kernels": found[:12]}

    def captured(self, call: Call) -> Any:
        """Capture the call in a CUDA graph, after a few runs, as PyTorch asks for; None: it cannot be."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # it waits for the device somewhere
            torch.cuda.synchronize()
            return None
        return graph


def operations(bench: Bench) -> None:
    """Every operation against its twin and the twin compiled."""
    torch = bench.torch
    from pydefect import ops
    from pydefect.ops import reference

    def close(rtol: float, atol: float) -> Callable[[Any, Any], None]:
        def agree(actual: Any, expected: Any) -> None:
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

        return agree

    def trained(loss: Callable[..., Any], *inputs: Any) -> Call:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        torch.manual_seed(1)
        found = loss(*leaves)
        parts = found if isinstance(found, tuple) else (found,)
        # Not randn_like, which draws in the order of the memory, and that is not the same for all. It then
        # lies in memory as the part does, as what follows a part would leave it.
        gradients = [
            torch.empty_like(part).copy_(torch.randn(part.shape, device=part.device))
            if part.dim()
            else torch.ones_like(part)
            for part in parts
        ]
        del found, parts

        def call() -> Any:
            return torch.autograd.grad(loss(*leaves), leaves, gradients)

        return call

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda")

    torch.manual_seed(0)
    # PyTorch's convolutions are TF32's unless they are told not to.
    torch.backends.cudnn.allow_tf32 = False

    def topk(queries: Any, bank: Any) -> Any:
        return torch.cdist(queries, bank).topk(3, largest=False).values.square()

    for n, m, d in ((3136, 784, 448), (100_352, 784, 448), (100_352, 784, 112)):
        queries, bank = random(n, d), random(m, d)
        fused = torch.compile(topk)
        bench.group(
            f"knn {n}x{m}x{d}",
            {
                "pydefect": lambda q=queries, b=bank: ops.knn(q, b, 3)[0],
                # The twin proper measures in float64; this is what users would write.
                "reference": lambda q=queries, b=bank: topk(q, b),
                "compiled": lambda q=queries, b=bank, f=fused: f(q, b),
            },
            flops=2.0 * n * m * d,
            traffic=4.0 * (n + m) * d,
            agree=close(1e-3, 1e-2),
        )

    for n, d in ((6272, 112), (6272, 448), (100_352, 112)):
        z = random(n, d)
        target = z + 0.5 * random(n, d)
        contenders = {"pydefect": trained(lambda z, t=target: ops.relaxed_contrastive(z, t), z)}
        if n < 10_000:
            twin = reference.relaxed_contrastive
            contenders["reference"] = trained(lambda z, t=target, f=twin: f(z, t), z)
            compiled = torch.compile(twin)
            contenders["compiled"] = trained(lambda z, t=target, f=compiled: f(z, t), z)
        # Forward half of each of three products of all pairs, backward two and the pulls' with the vectors.
        bench.group(
            f"relaxed_contrastive {n}x{d} forward+backward",
            contenders,
            flops=2.0 * n * n * d * 4.5,
            traffic=16.0 * n * d,
            agree=close(1e-3, 1e-9),
            rounds=ROUNDS if n < 10_000 else 3,
            capture=n < 10_000,
        )

    def spheres(features: Any, bank: Any) -> Any:
        # The twin proper searches in float64; this is what users would write.
        nearest = torch.cdist(features.detach(), bank).topk(3, largest=False).indices
        squared = (features.unsqueeze(1) - bank[nearest]).square().sum(2)
        return torch.relu(squared.clamp_min(1e-30).sqrt() - 1e-10).mean()

    def nearly_all_close(actual: Any, expected: Any) -> None:
        # Two centres equally near in float32 are not the same ones to both.
        far = (actual[0] - expected[0]).abs() > 1e-8 + 1e-3 * expected[0].abs()
        share = far.any(1).double().mean().item()
        assert share < 1e-3, f"gradients of {share:.2%} of the patches"

    features, bank = random(25_088, 112), random(784, 112)
    calls = {"pydefect": ops.hypersphere, "reference": spheres, "compiled": torch.compile(spheres)}
    bench.group(
        "hypersphere 25088x784x112 forward+backward",
        {name: trained(lambda x, b=bank, f=loss: f(x, b), features) for name, loss in calls.items()},
        flops=2.0 * 25_088 * 784 * 112,
        agree=nearly_all_close,
    )

    maps = [random(32, c, s, s) for c, s in ((64, 56), (128, 28), (256, 14))]
    weight, bias = random(112, 450) / 20, random(112)
    flops = 2.0 * 32 * 112 * sum(one.shape[1] * one.shape[2] ** 2 for one in maps)
    traffic = 4.0 * (sum(one.numel() for one in maps) + 32 * 56 * 56 * 112)
    compiled = torch.compile(reference.project_levels)
    bench.group(
        "project_levels 32 images forward",
        {
            "pydefect": lambda: ops.project_levels(maps, weight, bias),
            "reference": lambda: reference.project_levels(maps, weight, bias),
            "compiled": lambda: compiled(maps, weight, bias),
        },
        flops=flops,
        traffic=traffic,
        agree=close(1e-3, 1e-3),
    )
    bench.group(
        "project_levels 32 images forward+backward",
        {
            name: trained(lambda w, b, f=call: f(maps, w, b), weight, bias)
            for name, call in (
                ("pydefect", ops.project_levels),
                ("reference", reference.project_levels),
                ("compiled", compiled),
            )
        },
        flops=2 * flops,
        traffic=2 * traffic,
        agree=close(1e-2, 1.0),
    )

    distances = random(32, 56, 56, 3).abs()
    bench.group(
        "score_maps 32 images",
        {
            "pydefect": lambda: ops.score_maps(distances, (224, 224), 4.0),
            "reference": lambda: reference.score_maps(distances, (224, 224), 4.0),
        },
        traffic=4.0 * (distances.numel() + 32 * 224 * 224),
        agree=close(1e-4, 1e-5),
        rounds=5,
    )

    points = random(25_088, 448)
    bench.group(
        "kcenter_greedy 784 of 25088x448",
        {
            "pydefect": lambda: ops.kcenter_greedy(points, 784),
            "reference": lambda: reference.kcenter_greedy(points, 784),
        },
        traffic=4.0 * points.numel() * 784,
        rounds=3,
        capture=False,
    )
    centres, added = random(784, 448), random(3136, 448)
    bench.group(
        "kcenter_reduce 784+3136 to 784",
        {
            "pydefect": lambda: ops.kcenter_reduce(centres, added, 784),
            "reference": lambda: reference.kcenter_reduce(centres, added, 784),
        },
        rounds=3,
        capture=False,
    )
    bench.group(
        "assign_unique 784x3136x448",
        {
            "pydefect": lambda: ops.assign_unique(centres, added),
            "reference": lambda: reference.assign_unique(centres, added),
        },
        rounds=3,
        capture=False,
    )
    modules(bench, random, trained, close)
    torch.backends.cudnn.allow_tf32 = True


def modules(bench: Bench, random: Callable[..., Any], trained: Callable[..., Call], close: Callable) -> None:
    """The dual autoencoder's modules on maps, channels_last."""
    torch = bench.torch
    from pydefect import ops
    from pydefect.ops import reference

    batch, channels, side = 8, 384, 56
    reduced = channels // 16

    def map_() -> Any:
        return random(batch, channels, side, side).contiguous(memory_format=torch.channels_last)

    first, second = map_(), map_()
    coarse = random(batch, channels, side // 4, side // 4).contiguous(memory_format=torch.channels_last)
    dense = [random(reduced, channels) / 20, random(reduced), random(channels, reduced) / 5, random(channels)]
    head = [random(channels, reduced, 1, 1) / 5, random(channels)]
    cases = {
        "spatial_reunion": [first, second, coarse, random(1, channels, 3, 3) / 60, random(1)],
        "channel_reunion": [
            *(first, random(24, channels, 1, 1) / 20, random(24), random(1, 24, 1, 1) / 5, random(1)),
            *dense,
        ],
        "selective_fusion": [first, second, *dense[:2], *head, *head],
    }
    for name, inputs in cases.items():
        native, twin = getattr(ops, name), getattr(reference, name)
        compiled = torch.compile(twin)
        for what, wrap in (("forward", lambda f, x=inputs: lambda: f(*x)), ("forward+backward", None)):
            calls = {"pydefect": native, "reference": twin, "compiled": compiled}
            bench.group(
                f"{name} {batch}x{channels}x{side}x{side} {what}",
                {key: wrap(f) if wrap else trained(f, *inputs) for key, f in calls.items()},
                traffic=4.0 * first.numel() * (2 if what == "forward" else 6),
                agree=close(2e-3, 2e-3) if wrap else close(1e-2, 1.0),
            )
    # What a training step of one image of 256 pixels has behind its first convolution.
    wide = random(3, 128, 253, 253).bfloat16().contiguous(memory_format=torch.channels_last)
    pooling = {"pydefect": ops.relu_avg_pool, "reference": reference.relu_avg_pool}
    pooling["compiled"] = torch.compile(reference.relu_avg_pool)
    bench.group(
        "relu_avg_pool 3x128x253x253 bfloat16 forward+backward",
        {key: trained(f, wide) for key, f in pooling.items()},
        traffic=2.0 * wide.numel() * 3.5,
        agree=close(2e-2, 1e-2),
    )


def training_steps(bench: Bench) -> None:
    """The dual autoencoder's step from images on the card to new weights, eager and as a CUDA graph."""
    torch = bench.torch
    from pydefect.dual_ae import DualAEConfig
    from pydefect.dual_ae.frozen import NormalisedTeacher, arithmetic
    from pydefect.dual_ae.pdn import PDN
    from pydefect.dual_ae.trainer import build_network, step_losses
    from pydefect.features import resolve_precision

    device = torch.device("cuda")
    config = DualAEConfig(padding=False)  # at 256 pixels below: as EfficientAD
    precision = resolve_precision(config.precision, device)
    teacher = NormalisedTeacher(PDN(config.size).to(device, memory_format=torch.channels_last), precision)
    teacher.set_statistics(torch.zeros(384, device=device), torch.full((384,), 0.05, device=device))

    def stepping(images: list[Any], *, capturable: bool) -> Call:
        network = build_network(config, (256, 256), 0).to(device).train()
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True, capturable=capturable)
        targets = teacher.normalise(teacher.describe(images[0]))

        def step() -> Any:
            with arithmetic(precision, device):
                of_augmented = teacher(images[1])
                losses = step_losses(network, config, images[0], targets, images[1], of_augmented, images[2])
            optimiser.zero_grad(set_to_none=True)
            losses.sum().backward()
            optimiser.step()
            return losses.detach()

        return step

    for batch in (1, 8):
        images = [torch.randn(batch, 3, 256, 256, device=device) for _ in range(3)]
        images = [one.contiguous(memory_format=torch.channels_last) for one in images]
        calls = {"eager": stepping(images, capturable=False)}
        graph = bench.captured(stepping(images, capturable=True))
        if graph is not None:
            calls["graph"] = graph.replay
        bench.group(f"dual_ae step batch {batch}", calls, capture=False)


def whole_paths(bench: Bench) -> None:
    """Scores and fits of ConPatch on a product made for it."""
    torch = bench.torch
    import pydefect
    from pydefect.data.procedural import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(Path(folder) / "product", n_train=32, n_test_good=1, n_per_defect=1, size=224)
        files = sorted((root / "train" / "good").iterdir())

        def fit(**settings: Any) -> Any:
            return pydefect.fit(
                files, weights="random", device="cuda", progress=False, calibration_folds=0, **settings
            )

        detector = fit(epochs=0, resize=224)
        torch.manual_seed(0)
        for batch in (1, 8, 32):
            images = torch.randn(batch, 3, 224, 224, device="cuda")
            with torch.inference_mode():
                bench.group(
                    f"score resnet18 batch {batch}", {"pydefect": lambda x=images: detector.predict(x)}
                )
        for batch in (2, 8, 32):
            if clock.left() < 20:
                say(f"fit at batch {batch}: no time left")
                continue
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            fit(epochs=1, batch_size=batch)
            torch.cuda.synchronize()
            seconds = time.monotonic() - started
            peak = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            row = {"group": f"fit resnet18 batch {batch}", "contender": "pydefect", "ms": 1e3 * seconds}
            bench.rows.append({**row, "peak_mib": peak, "images_per_second": len(files) / seconds})
            say(f"fit at batch {batch}: {len(files) / seconds:.1f} images/s, peak {peak} MiB")


# --- Targets -----------------------------------------------------------------------------------------------


def targets(bench: Results) -> list[dict[str, Any]]:
    """The targets for an H200 or H100, each with what was measured."""
    found: list[dict[str, Any]] = []

    def add(what: str, target: float, measured: float | None, *, at_most: bool = False) -> None:
        met = None if measured is None else measured <= target if at_most else measured >= target
        found.append({"what": what, "target": target, "measured": measured, "met": met})

    def ratio(group: str, rival: str, *, device: bool = False) -> float | None:
        ours, theirs = bench.ms(group, device=device), bench.ms(group, rival, device=device)
        return None if ours is None or theirs is None else theirs / ours

    large = "knn 100352x784x448"
    add(f"{large}: cdist+topk / ours", 3.0, ratio(large, "reference"))
    ours = bench.ms(large)
    for limit in ("3xtf32", "3xfloat16"):
        most = bench.limits[f"{limit} TFLOP/s"]
        rate = None if ours is None else 2.0 * 100_352 * 784 * 448 / ours / 1e9 / most
        add(f"{large}: share of the limit of {limit}", 0.6, rate)
    for d in (112, 448):
        group = f"relaxed_contrastive 6272x{d} forward+backward"
        add(f"{group}: reference / ours", 4.0, ratio(group, "reference"))
    group = "relaxed_contrastive 100352x112 forward+backward"
    peak = next((row.get("peak_mib") for row in bench.rows if row["group"] == group), None)
    add(f"{group}: GB beyond inputs", 2.0, None if peak is None else peak * 2**20 / 1e9, at_most=True)
    for name in ("spatial_reunion", "channel_reunion", "selective_fusion"):
        group = f"{name} 8x384x56x56 forward+backward"
        for device, where in ((False, "as called"), (True, "on the card")):
            add(f"{group}: reference / ours, {where}", 2.0, ratio(group, "reference", device=device))
            add(f"{group}: compiled / ours, {where}", 1.1, ratio(group, "compiled", device=device))
    group = "dual_ae step batch 1"
    eager, graph = bench.ms(group, "eager"), bench.ms(group, "graph")
    share = None if eager is None or graph is None else eager / graph
    add(f"{group}: eager / captured in a graph", 1.5, share)
    batch = bench.ms("score resnet18 batch 32")
    add("score resnet18 batch 32: images a second", 2000.0, None if batch is None else 32e3 / batch)
    return found


def print_table(bench: Results, met: list[dict[str, Any]]) -> None:
    print(
        "\n| what | contender | ms as called | ms on the card | of limit | peak MiB | agreement |"
        "\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for row in bench.rows:
        if "ms" not in row:
            why = row.get("failed", row.get("skipped"))
            print(f"| {row['group']} | {row.get('contender', '')} | {why} | | | | |")
            continue
        card = on_the_card(row)
        share = f"{row['bound_ms'] / (card or row['ms']):.0%}" if row.get("bound_ms") else ""
        alone = "" if card is None else f"{card:.3f}"
        print(
            f"| {row['group']} | {row['contender']} | {row['ms']:.3f} | {alone} | {share} "
            f"| {row.get('peak_mib', '')} | {row.get('agreement', '')} |"
        )
    print("\n| target | asked for | measured | |\n| --- | --- | --- | --- |")
    for one in met:
        measured = "" if one["measured"] is None else f"{one['measured']:.3g}"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[one["met"]]
        print(f"| {one['what']} | {one['target']} | {measured} | {verdict} |")


def measure(arguments: argparse.Namespace, built: dict[str, Any]) -> int:
    import torch

    info = installed()
    say(info)
    tests = run_tests(min(150.0, clock.left() / 3)) if arguments.tests else {}
    if tests:
        say(f"tests: {tests['summary']} ({tests['ended']})")
        print("\n".join(tests["failed"]), flush=True)
    bench = Bench(arguments.kernels)
    bench.measure_limits()
    say(", ".join(f"{name} {value:.0f}" for name, value in bench.limits.items()))
    try:
        for part in (operations, training_steps, whole_paths):
            part(bench)
    finally:  # what was measured is kept whatever comes after it
        met = targets(bench)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        run = {
            "datetime": datetime.now(timezone.utc).isoformat(),
            "card": torch.cuda.get_device_name(),
            "driver": driver.stdout.strip(),
            "versions": {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "python": sys.version.split()[0],
            },
            "build": {**built, "info": info},
            "tests": tests,
            "limits": bench.limits,
            "rows": bench.rows,
            "targets": met,
            "seconds": round(clock.used(), 1),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(run, indent=1) + "\n")
        print_table(bench, met)
    return int(bool(tests.get("failed")))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--show", type=Path, metavar="JSON", help="only print the tables of an earlier run")
    parser.add_argument("--kernels", action="store_true", help="time every call's kernels one by one too")
    parser.add_argument("--build", type=Path, help="compile the package into this folder and use that")
    parser.add_argument("--built", help=argparse.SUPPRESS)
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave the tests out")
    parser.add_argument("--seconds", type=float, default=clock.limit, help="be done by then")
    arguments = parser.parse_args()
    clock.limit = arguments.seconds
    if arguments.show is not None:
        run = json.loads(arguments.show.read_text())
        results = Results(run["rows"], run["limits"])
        print_table(results, targets(results))
        return 0
    if arguments.out is None:
        parser.error("--out or --show is needed")
    arguments.out = arguments.out.absolute()
    needed = [*MODULES, *(TEST_MODULES if arguments.tests else [])]
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        print(f"benchmarks/gpu.py needs {', '.join(missing)}; not found", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; there is none here", file=sys.stderr)
        return 2
    if arguments.build is None:
        return measure(arguments, json.loads(arguments.built or "{}"))
    folder = arguments.build.absolute()
    built = build(folder)
    say("built: " + ", ".join(f"{what} {value}" for what, value in built.items()))
    # A process of its own that finds the package just built; what the build took is its time too.
    command = [sys.executable, __file__, "--out", str(arguments.out), "--built", json.dumps(built)]
    command += ["--seconds", str(arguments.seconds)]
    command += [] if arguments.tests else ["--no-tests"]
    command += ["--kernels"] if arguments.kernels else []
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PYDEFECT_BENCHMARK_USED": str(clock.used()),
    }
    return subprocess.run(command, env=environment, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
