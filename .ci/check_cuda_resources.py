"""Compare the CUDA kernels' registers, stack and shared memory with the committed table.

A kernel that comes to need more registers runs fewer blocks at a time, and one with a stack keeps in slow
memory what should be in registers: neither shows in a test, so both are shown here. Needs cuobjdump (PyPI:
nvidia-cuda-cuobjdump, which is found where pip puts it).

Usage: python .ci/check_cuda_resources.py LIBPYDEFECT_CUDA.SO [--cuobjdump PROGRAM] [--write]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "resources.txt"
COLUMNS = ("arch", "registers", "stack", "shared", "kernel")
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")

Resources = dict[tuple[str, str], tuple[int, int, int]]


def read_library(library: Path, cuobjdump: str) -> Resources:
    """(architecture, kernel) -> registers a thread, stack bytes a thread, static shared bytes a block."""
    command = [cuobjdump, "--dump-resource-usage", str(library)]
    dump = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: Resources = {}
    for part in re.split(r"^arch = ", dump, flags=re.MULTILINE)[1:]:
        arch = part.split(None, 1)[0]
        for name, registers, stack, shared in USAGE.findall(part):
            found[arch, kernel_name(name)] = (int(registers), int(stack), int(shared))
    return found


def kernel_name(symbol: str) -> str:
    """`relaxed_contrastive.cu: add_terms<true>` for the mangled name, whose hash changes with the sources."""
    # nvcc's name for a file: a hash, which may be digits only, the length of the name and the name.
    file = re.search(r"_[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}", symbol)
    plain = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"pydefect::cuda::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", plain)
    depth = 0
    for place, letter in enumerate(plain):  # the arguments begin at the first bracket outside of <...>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and place > 0:
            plain = plain[:place]
            break
    return f"{file.group(1) + '.cu: ' if file else ''}{plain}"


def read_table() -> Resources:
    rows = [line.split(None, 4) for line in TABLE.read_text().splitlines() if line and line[0] != "#"]
    return {(arch, kernel): (int(r), int(s), int(m)) for arch, r, s, m, kernel in rows}


def write_table(found: Resources) -> None:
    lines = [
        "# What the kernels of csrc/cuda take, by cuobjdump --dump-resource-usage: registers and stack bytes",
        "# a thread, static shared bytes a block. Compared in CI and written by .ci/check_cuda_resources.py.",
        "# " + " ".join(COLUMNS),
    ]
    for (arch, kernel), (registers, stack, shared) in sorted(found.items()):
        lines.append(f"{arch} {registers:4d} {stack:5d} {shared:6d}  {kernel}")
    TABLE.write_text("\n".join(lines) + "\n")


def complaints(found: Resources, allowed: Resources) -> list[str]:
    result = [f"{arch} {kernel}: no longer there" for arch, kernel in sorted(allowed.keys() - found.keys())]
    for key, values in sorted(found.items()):
        if key not in allowed:
            result.append(f"{' '.join(key)}: not in the table")
            continue
        result += [
            f"{' '.join(key)}: {value} {what}, the table has {limit}"
            for what, value, limit in zip(COLUMNS[1:4], values, allowed[key], strict=True)
            if value > limit
        ]
    return result


def _from_pip() -> str | None:
    """Where the package puts the program, which is on no path."""
    places = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    found = [program for place in places for program in place.glob("nvidia/*/bin/cuobjdump")]
    return str(found[0]) if found else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--cuobjdump", help="the program; PyPI: nvidia-cuda-cuobjdump")
    arguments = parser.parse_args()
    cuobjdump = arguments.cuobjdump or shutil.which("cuobjdump") or _from_pip()
    if cuobjdump is None:
        parser.error(
            "no cuobjdump: `pip install nvidia-cuda-cuobjdump`, or name the program with --cuobjdump"
        )
    if not arguments.library.is_file():
        parser.error(f"no library {arguments.library}")
    found = read_library(arguments.library, cuobjdump)
    if not found:
        print(f"{arguments.library}: no kernels found", file=sys.stderr)
        return 1
    if arguments.write:
        write_table(found)
        return 0
    wrong = complaints(found, read_table())
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(
            "If the change is worth it: python .ci/check_cuda_resources.py LIBRARY --write", file=sys.stderr
        )
    else:
        print(f"{len(found)} kernels take no more than {TABLE.name} says")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
