"""What the two scripts here share: a paper's table, the runs behind our column, and both side by side.

Our figures come from ``pydefect.benchmark``: last epoch, one process a fit, finished fits are not repeated.
Where only some of a data set's categories are there, our mean is over those, and the paper's mean over the
same categories stands beside it wherever the paper gives figures by category.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydefect import InputError
from pydefect.benchmark import Variant, find_categories, run_benchmark
from pydefect.benchmark.plan import Category
from pydefect.benchmark.tables import cell
from pydefect.cli._console import parse_settings
from pydefect.registry import METHOD_NAMES, detector_type

Figures = tuple[float | None, ...]


@dataclass(frozen=True)
class Fit:
    """What of pydefect stands for a row: method, preset, settings and the backbone it needs."""

    method: str
    preset: str = "paper"
    settings: Mapping[str, Any] = field(default_factory=dict)
    backbone: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a paper's table.

    Attributes
    ----------
    label
        As printed.
    printed
        Its figures, %, one a column.
    fit
        Ours; None for methods that are not part of pydefect.
    by_category
        The figures by category, where the paper has them.
    """

    label: str
    printed: Figures
    fit: Fit | None = None
    by_category: Mapping[str, Figures] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperTable:
    """A table: title, names of the figures, rows, and which categories they are means over."""

    number: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    categories: tuple[str, ...]
    data: str
    """The data set's option."""
    by_category: int | None = None
    """Print this one of the figures by category, without means."""


@dataclass(frozen=True)
class Given:
    """What the caller has: data, weights, and how to run."""

    categories: Mapping[str, Mapping[str, Category]]
    weights: Mapping[str, str]
    instead: str | None
    settings: Mapping[str, Any]
    out: Path
    seeds: Sequence[int]
    jobs: int
    threads: int | None
    device: str


def parser(description: str, roots: Mapping[str, str]) -> argparse.ArgumentParser:
    """Options of both scripts; ``roots`` are those that name a data set's folder, with their help."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, text in roots.items():
        made.add_argument(f"--{option}", type=Path, action="append", metavar="ROOT", help=text)
    made.add_argument("--tables", default="all", help="numbers with commas between, or all")
    made.add_argument("--out", type=Path, required=True, help="results, and what a second call goes on from")
    made.add_argument("--seeds", default="0", help="with commas between")
    made.add_argument("--jobs", type=int, default=1)
    made.add_argument("--threads", type=int)
    made.add_argument("--device", default="cpu")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of every fit that has it and does not set it itself, such as "
        "contrastive_patches=1024; printed above each table",
    )
    return made


def given(
    options: argparse.Namespace,
    roots: Sequence[str],
    weights: Mapping[str, str | None],
    instead: str | None = None,
) -> Given:
    """What the command line of :func:`parser` gives.

    Parameters
    ----------
    options
        Parsed.
    roots
        The options that name a data set's folders.
    weights
        By backbone; None: not given.
    instead
        The backbone to take where another one's weights are not given; None: such rows are left out.
    """
    folders = {option: getattr(options, option) or [] for option in roots}
    return Given(
        {
            option: {one.dataset.name: one for one in find_categories(of)} if of else {}
            for option, of in folders.items()
        },
        {name: source for name, source in weights.items() if source is not None},
        instead,
        parse_settings(options.set, ()),
        options.out,
        [int(seed) for seed in options.seeds.split(",")],
        options.jobs,
        options.threads,
        options.device,
    )


def chosen(tables: Sequence[PaperTable], numbers: str) -> list[PaperTable]:
    """The tables that ``--tables`` names.

    Raises
    ------
    InputError
        One of them is not there.
    """
    if numbers == "all":
        return list(tables)
    known = [table.number for table in tables]
    if unknown := [number for number in numbers.split(",") if number not in known]:
        raise InputError(f"--tables: {', '.join(unknown)} given; allowed are all, {', '.join(known)}")
    return [table for table in tables if table.number in numbers.split(",")]


def _check_settings(tables: Sequence[PaperTable], settings: Mapping[str, Any]) -> None:
    """Refuse a setting that no fit of the tables has: it would be printed above them and do nothing."""
    methods = {row.fit.method for table in tables for row in table.rows if row.fit is not None}
    known = {
        setting.name
        for method in methods & set(METHOD_NAMES.names())
        for setting in dataclasses.fields(detector_type(method).config_type)
    }
    if unknown := sorted(set(settings) - known):
        raise InputError(f"--set: {', '.join(unknown)} is a setting of no method in these tables")


def show(
    tables: Sequence[PaperTable],
    given: Given,
    figures: Callable[[Mapping[str, Any]], Figures],
) -> None:
    """Fit what there is data, weights and a method for; print every table and what is missing.

    Parameters
    ----------
    tables
        What to print.
    given
        What there is.
    figures
        Takes a table's figures, in its columns' order, from a row of results.
    """
    _check_settings(tables, given.settings)
    for table in tables:
        present = given.categories[table.data]
        names = [name for name in table.categories if name in present]
        lacking = [name for name in table.categories if name not in present]
        print(f"\n## Table {table.number}: {table.title}\n")
        if given.settings:
            print(f"Ours with {', '.join(f'{name}={value}' for name, value in given.settings.items())}.\n")
        if not names:
            print(f"Not run: no category of it is there (--{table.data}); paper only.\n")
        elif lacking:
            print(
                f"Ours over {len(names)} of {len(table.categories)} categories ({', '.join(names)}); "
                f"missing: {', '.join(lacking)}.\n"
            )
        notes: list[str] = []
        ours = {row.label: _run(row, [present[name] for name in names], given, notes) for row in table.rows}
        if table.by_category is None:
            _print(table, names, ours, figures)
        else:
            _print_by_category(table, table.by_category, ours, figures)
        for note in dict.fromkeys(notes):
            print(f"- {note}")
        sys.stdout.flush()


def _run(
    row: Row, categories: Sequence[Category], given: Given, notes: list[str]
) -> list[dict[str, Any]] | None:
    """The results of a row's fits; None where they cannot be had, which the notes explain."""
    if row.fit is None or not categories:
        return None
    settings = dict(row.fit.settings)
    weights = "imagenet"
    if row.fit.backbone is not None:
        backbone = row.fit.backbone
        if backbone not in given.weights and given.instead is not None:
            notes.append(f"ours of {row.label}: {given.instead} in the place of {backbone}")
            backbone = given.instead
        if backbone not in given.weights:
            notes.append(f"{row.label}: not run, no weights of {backbone} given")
            return None
        settings["backbone"], weights = backbone, given.weights[backbone]
    elif settings.get("teacher") in given.weights:
        weights = given.weights[settings["teacher"]]
    try:
        # What makes the row stays as its label says.
        others = {name: value for name, value in given.settings.items() if name not in settings}
        variant = Variant(row.fit.method, row.fit.preset, settings, row.label).with_known(others)
    except InputError as error:
        notes.append(f"{row.label}: not run, {error}")
        return None
    rows = run_benchmark(
        [variant],
        categories,
        given.out,
        weights=weights,
        seeds=given.seeds,
        device=given.device,
        jobs=given.jobs,
        threads=given.threads,
        on_row=lambda one, done, total: print(
            f"[{done}/{total}] {one['label']} on {one['category']}: {one['status']}", file=sys.stderr
        ),
    )
    notes += [
        f"{row.label} on {one['category']}, seed {one['seed']}: failed: {one['error']}"
        for one in rows
        if one["status"] == "failed"
    ]
    return [one for one in rows if one["status"] == "finished"]


def _print(
    table: PaperTable,
    names: Sequence[str],
    ours: Mapping[str, list[dict[str, Any]] | None],
    figures: Callable[[Mapping[str, Any]], Figures],
) -> None:
    some = 0 < len(names) < len(table.categories)
    header = ["", f"paper: {' / '.join(table.columns)}"]
    header += ["paper, these categories"] if some else []
    header += ["ours"] if names else []
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in table.rows:
        cells = [row.label, _text(row.printed)]
        if some:
            known = [row.by_category[name] for name in names if name in row.by_category]
            cells.append(_text(_mean(known)) if len(known) == len(names) else "")
        if names:
            cells.append(_ours(ours[row.label], names, figures))
        print("| " + " | ".join(cells) + " |")
    print()


def _print_by_category(
    table: PaperTable,
    column: int,
    ours: Mapping[str, list[dict[str, Any]] | None],
    figures: Callable[[Mapping[str, Any]], Figures],
) -> None:
    shown = [row.label for row in table.rows if ours[row.label]]
    header = ["", *(row.label for row in table.rows), *(f"{label}, ours" for label in shown)]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for name in table.categories:
        cells = [_text((row.by_category[name][column],)) for row in table.rows]
        for label in shown:
            of_name = [row for row in ours[label] or [] if row["category"].split("/")[-1] == name]
            known = cell([figure for row in of_name if (figure := figures(row)[column]) is not None])
            cells.append("" if known is None else known.text(2))
        print("| " + " | ".join([name, *cells]) + " |")
    print()


def _ours(
    rows: list[dict[str, Any]] | None,
    names: Sequence[str],
    figures: Callable[[Mapping[str, Any]], Figures],
) -> str:
    """Mean over the categories and, over several seeds, its spread; nothing where one is missing."""
    by_seed: dict[int, dict[str, Figures]] = {}
    for row in rows or []:
        by_seed.setdefault(row["seed"], {})[row["category"].split("/")[-1]] = figures(row)
    means = [_mean([of[name] for name in names]) for of in by_seed.values() if set(of) >= set(names)]
    if not means:
        return ""
    columns = [[mean[column] for mean in means] for column in range(len(means[0]))]
    parts = []
    for values in columns:
        known = cell([value for value in values if value is not None])
        parts.append("-" if known is None else known.text(2))
    return " / ".join(parts)


def _mean(rows: Sequence[Figures]) -> Figures:
    """By column; None where a row has no figure."""
    return tuple(
        None if None in column else math.fsum(value for value in column if value is not None) / len(column)
        for column in zip(*rows, strict=True)
    )


def _text(figures: Figures) -> str:
    """As printed in tables of percents."""
    return " / ".join("-" if figure is None else f"{figure:.2f}" for figure in figures)
