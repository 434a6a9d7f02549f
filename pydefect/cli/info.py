"""``pydefect info``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pydefect.cli._console import Debug
from pydefect.declared import DeclaredNames, package_name


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, methods, backbones, native code, CUDA and cached weights; for bug reports."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for room, entries in facts.items():
        typer.echo(room)
        for name, value in entries.items():
            typer.echo(f"  {name:<22}{_text(value)}")


def _facts() -> dict[str, dict[str, Any]]:
    import torch

    from pydefect.backbones import BACKBONE_NAMES, IMAGENET_WEIGHTS, cached_weights
    from pydefect.buildinfo import build_info, versions
    from pydefect.registry import METHOD_NAMES

    build = build_info()
    cuda = torch.cuda.is_available()
    devices = (
        [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else []
    )
    return {
        "versions": versions(),
        "methods": _named(METHOD_NAMES),
        "backbones": _named(BACKBONE_NAMES),
        "native code": {
            "compiler": build.compiler,
            "built against torch": build.torch_built_against,
            "oldest torch": build.torch_oldest,
            "pybind11": build.pybind11,
            "instruction sets": build.cpu_levels_compiled,
            "usable here": build.cpu_levels_usable,
            "in use": build.cpu_level_active,
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "available to torch": cuda,
            "devices": devices,
            "nvcc": build.nvcc,
            "kernels built for": build.cuda_architectures,
            "kernels loaded": build.cuda_kernels_loaded,
            "load error": build.cuda_load_error,
        },
        "imagenet weights": {
            name: None if (file := cached_weights(name)) is None else str(file) for name in IMAGENET_WEIGHTS
        },
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _named(names: DeclaredNames) -> dict[str, list[str]]:
    return {
        "of pydefect": list(names.own),
        **{
            name: [f"{point.value} ({package_name(point)})" for point in points]
            for name, points in names.points().items()
        },
    }
