"""Methods against data sets, as one table that can be repeated: ``pydefect benchmark``."""

from __future__ import annotations

from pydefect.benchmark.plan import Variant, find_categories
from pydefect.benchmark.results import read_results
from pydefect.benchmark.runner import run_benchmark
from pydefect.benchmark.tables import render_tables, write_tables

__all__ = ["Variant", "find_categories", "read_results", "render_tables", "run_benchmark", "write_tables"]
