"""``pydefect benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pydefect.cli._console import BatchSize, Debug, Device, duration, parse_settings, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydefect.benchmark import Variant

_OPTIONS = ("method", "preset", "backbone", "weights", "seed", "device", "checkpoint", "on_error")


def benchmark(
    ctx: typer.Context,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data", metavar="ROOT", help="A folder of data sets' categories, or one; may be repeated."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Results and tables; also what to resume.")
    ],
    methods: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Methods, with commas between (`pydefect info` lists them); conpatch:paper is the preset of "
            "that name.",
        ),
    ] = "conpatch",
    categories: Annotated[
        str, typer.Option(metavar="LIST", help="Categories, with commas between, or all.")
    ] = "all",
    backbone: Annotated[
        str | None,
        typer.Option(help="The frozen network of all methods that have one.  [default: each method's]"),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Its weights: imagenet, random, or a .pth, .safetensors or .npz file.")
    ] = "imagenet",
    seeds: Annotated[str, typer.Option(metavar="LIST", help="One fit for each, with commas between.")] = "0",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of all methods that have it; may be repeated."
        ),
    ] = None,
    best_epoch: Annotated[
        bool,
        typer.Option(
            "--best-epoch",
            help="Show the best number of epochs beside the last, chosen on the test set and labelled so.",
        ),
    ] = False,
    keep_maps: Annotated[
        bool, typer.Option("--keep-maps", help="Keep scores and maps of every pair, for `pydefect report`.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once; times are fair with one only.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each process.  [default: all cores over --jobs]")
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "cpu",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No line for every pair that is measured.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Fit and measure methods on data sets, and write the table of it.

    DIR then holds results.jsonl, a line for every method, category and seed with its figures, configuration,
    versions, times and peak memory; and table.md, table.csv and table.tex. The same command goes on after an
    interruption, and repeats nothing that it finds finished with equal settings and equal data.

    \b
    pydefect benchmark --data mvtec_ad --methods conpatch,patchcore,padim --out table
    pydefect benchmark --data mvtec_ad --categories bottle,cable --seeds 0,1,2 --out table
    """
    changes = parse_settings(settings or [], _OPTIONS)
    chosen_seeds = _seeds(seeds)
    ctx.obj.resume = f"the same command goes on from {out}"

    from pydefect.benchmark import find_categories, run_benchmark, write_tables

    variants = _variants(_list(methods, "--methods"), backbone, changes)
    names = None if categories.strip() == "all" else _list(categories, "--categories")
    found = find_categories(data, names)
    rows = run_benchmark(
        variants,
        found,
        out,
        weights=weights,
        seeds=chosen_seeds,
        device=device,
        batch_size=batch_size,
        jobs=jobs,
        threads=threads,
        keep_maps=keep_maps,
        best_epoch=best_epoch,
        on_row=None if quiet else _print_row,
    )
    write_tables(rows, out)
    failed = sum(row["status"] == "failed" for row in rows)
    typer.echo(f"{len(rows) - failed} of {len(rows)} pairs measured: {out / 'table.md'}")
    if failed:
        say(f"pydefect: {failed} pairs failed; {out / 'work'} has their logs, the same command tries again")
        raise typer.Exit(1)


def _list(text: str, option: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise typer.BadParameter("none given", param_hint=option)
    return list(dict.fromkeys(entries))


def _seeds(text: str) -> list[int]:
    entries = _list(text, "--seeds")
    if not all(entry.isascii() and entry.isdigit() and int(entry) < 2**32 for entry in entries):
        raise typer.BadParameter(f"{text!r} is no list of whole numbers from 0 on", param_hint="--seeds")
    return list(dict.fromkeys(map(int, entries)))


def _variants(methods: Sequence[str], backbone: str | None, changes: dict[str, Any]) -> list[Variant]:
    from pydefect.benchmark import Variant

    given = changes if backbone is None else {**changes, "backbone": backbone}
    variants = []
    for entry in methods:
        method, _, preset = entry.partition(":")
        variants.append(Variant(method, preset or "default").with_known(given))
    for name in given:
        if not any(name in variant.settings for variant in variants):
            option = "--backbone" if name == "backbone" else "--set"
            raise typer.BadParameter(f"no method here has a setting {name}", param_hint=option)
    return variants


def _print_row(row: dict[str, Any], done: int, total: int) -> None:
    what = f"[{done}/{total}] {row['label']} on {row['category']}, seed {row['seed']}"
    if row["status"] == "failed":
        say(f"{what}: failed: {row['error']}")
        return
    image, pixel = row["metrics"]["image_auroc"], row["metrics"]["pixel_auroc"]
    pixels = "no masks" if pixel is None else f"pixels {100 * pixel:.2f}"
    typer.echo(
        f"{what}: AUROC of images {100 * image:.2f}, {pixels}; fit {duration(row['fit_seconds'])}, "
        f"{1000 * row['seconds_per_image']:.0f} ms an image, {row['peak_rss_mb']:.0f} MB"
    )
