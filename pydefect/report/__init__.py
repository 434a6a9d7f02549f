"""A run folder as one HTML file that needs nothing else: tables, charts, and a gallery of its images."""

from pydefect.report.index import write_index
from pydefect.report.page import write_report

__all__ = ["write_index", "write_report"]
