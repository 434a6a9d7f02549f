"""Prove that the operator libraries stay inside LibTorch's stable ABI, need no more than the oldest supported
PyTorch, and use nothing of Python's.

Usage: check_stable_abi.py FOLDER_OF_THE_INSTALLED_PACKAGE [--require-cuda]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

OLDEST_TORCH = (2, 11)


def audit(package: Path) -> dict[str, dict]:
    command = [sys.executable, "-m", "torch_abi_audit.cli", str(package), "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {Path(library["path"]).name: library for library in report["bundled_libs"]}


def python_symbols(library: str) -> list[str]:
    command = ["nm", "-D", "--undefined-only", "--format=just-symbols", library]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]


def complaints_about(library: dict) -> list[str]:
    torch = library["torch"]
    found = [f"outside the stable ABI: {symbol}" for symbol in torch["unstable_symbols"]]
    found += [f"not a known function of the C shim: {symbol}" for symbol in torch["unknown_shim_symbols"]]
    found += [f"a symbol of Python: {symbol}" for symbol in python_symbols(library["path"])]
    if not torch["stable"]:
        found.append("not recognised as a library on the stable ABI")
    elif tuple(map(int, torch["min_torch_version"].split(".")[:2])) > OLDEST_TORCH:
        found.append(f"needs torch {torch['min_torch_version']}: {torch['version_defining_symbols']}")
    if library["error"]:
        found.append(library["error"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--require-cuda", action="store_true")
    arguments = parser.parse_args()

    libraries = audit(arguments.package)
    required = ["libpydefect_cpu.so"] + ["libpydefect_cuda.so"] * arguments.require_cuda
    failed = False
    for name in sorted({*required, *libraries}):
        found = ["missing"] if name not in libraries else complaints_about(libraries[name])
        failed |= bool(found)
        for complaint in found:
            print(f"{name}: {complaint}", file=sys.stderr)
        if not found:
            print(f"{name}: stable ABI, needs torch {libraries[name]['torch']['min_torch_version']}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
