"""The command line, one file a command.

Nothing here imports PyTorch before a command runs: ``pydefect --help`` answers at once.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any

import typer

from pydefect.cli._console import OneLineErrors, say
from pydefect.cli.benchmark import benchmark
from pydefect.cli.calibrate import calibrate
from pydefect.cli.demo import demo
from pydefect.cli.evaluate import evaluate
from pydefect.cli.evaluate_maps import evaluate_maps
from pydefect.cli.export import export
from pydefect.cli.fit import fit
from pydefect.cli.info import info
from pydefect.cli.pretrain_teacher import pretrain_teacher
from pydefect.cli.report import report
from pydefect.cli.score import score
from pydefect.heap import return_large_blocks
from pydefect.interruption import INTERRUPTED
from pydefect.version import VERSION

__all__ = ["app", "main"]

app = typer.Typer(
    name="pydefect",
    cls=OneLineErrors,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(fit)
app.command()(score)
app.command()(evaluate)
app.command()(evaluate_maps)
app.command()(calibrate)
app.command()(report)
app.command()(benchmark)
app.command()(info)
app.command()(demo)
app.command()(pretrain_teacher)
app.command()(export)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"pydefect {VERSION}")
        raise typer.Exit


@app.callback()
def _pydefect(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Find defects in images of industrial products from good examples alone.

    \b
    pydefect demo                                    try it, offline
    pydefect fit GOOD_IMAGES --out MODEL             learn what good looks like
    pydefect score MODEL NEW_IMAGES --out SCORES     find what does not
    pydefect evaluate MODEL DATASET                  measure, where labels are known
    pydefect evaluate-maps MAPS DATASET              the same of another program's anomaly maps
    pydefect report RUN                              show what `evaluate --out RUN` found, as a page
    pydefect benchmark --data DATASETS --out TABLE   compare methods over data sets
    pydefect calibrate MODEL --normal GOOD_IMAGES    set how often good images may raise an alarm
    pydefect export MODEL --out FILE.onnx            for programs without Python

    Exit codes: 0; 2 for a wrong call or bad input; 1 for any other failure; 130 when interrupted.
    """


def main() -> None:
    """Run the command line of this process."""
    return_large_blocks()
    for stream in (sys.stdout, sys.stderr):
        # A name may hold letters that the terminal's encoding has not: no reason to fail after the work.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        app()
    except KeyboardInterrupt:  # before there is a command that would answer it
        say("pydefect: interrupted")
        sys.exit(INTERRUPTED)


def _show_warning(message: Warning | str, *_where: Any, **_how: Any) -> None:
    # A user of the command line has no use for the file and line of our source.
    say(f"pydefect: warning: {message}")
