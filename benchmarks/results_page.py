"""Put a benchmark's tables into docs/results.md, and keep the lines that they are made of.

    python benchmarks/results_page.py comparison/results.jsonl

Times are left out: those of a run are in its lines, and compare only where the machine had nothing else to
do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pydefect.benchmark import read_results, render_tables
from pydefect.benchmark.tables import MEASURES
from pydefect.persistence import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGE, LINES = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results" / "methods.jsonl"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
SHOWN = ("image_auroc", "pixel_auroc", "pixel_aupro", "image_f1_max", "peak_rss_mb")


def tables(lines: Path) -> str:
    """The page's tables, as Markdown."""
    measures = [measure for measure in MEASURES if measure.name in SHOWN]
    return render_tables(read_results(lines), measures=measures)


def with_tables(page: str, lines: Path) -> str:
    """The page with these tables in the place of its own."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables(lines) + END + after


def main() -> None:
    """Read the command line, write page and lines."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results.jsonl of `pydefect benchmark`")
    given = parser.parse_args()
    read_results(given.results)
    write_atomically(LINES, given.results.read_bytes())
    page = with_tables(PAGE.read_text(encoding="utf-8"), LINES)
    write_atomically(PAGE, page.encode())


if __name__ == "__main__":
    main()
