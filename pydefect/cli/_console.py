"""What all commands share: options, exit codes and how an error looks."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pydefect.errors import InputError, PydefectError
from pydefect.interruption import INTERRUPTED
from pydefect.places import check_file_writable

__all__ = [
    "STANDARD_OUTPUT",
    "BatchSize",
    "Call",
    "Debug",
    "Device",
    "OnError",
    "OnErrorOption",
    "OneLineErrors",
    "Quiet",
    "Weights",
    "check_new_file",
    "duration",
    "parse_settings",
    "say",
]

FAILURE, WRONG_CALL = 1, 2
# As an option's file.
STANDARD_OUTPUT = Path("-")
DEBUG_VARIABLE = "PYDEFECT_DEBUG"


@dataclass
class Call:
    """What the error handling knows about the running command; its context's ``obj``."""

    debug: bool = False
    resume: str | None = None
    """What to say after an interruption."""
    context: typer.Context | None = None
    """Of the command, once it is known which."""


class OnError(str, Enum):
    """What to do about an image that cannot be read."""

    STOP = "raise"
    SKIP = "skip"


def _begin_command(ctx: typer.Context, value: bool) -> bool:
    """Tell the call which command it is, and --debug, which every command has."""
    ctx.obj.context = ctx
    if value:
        ctx.obj.debug = True
    return value


Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help=f"Show the traceback of an error. {DEBUG_VARIABLE}=1 does the same.",
        callback=_begin_command,
        is_eager=True,
    ),
]


def _is_quiet(value: bool) -> bool:
    # In a log every update of a bar would stay.
    return value or sys.stderr is None or not sys.stderr.isatty()


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress bars. There are none either where standard error is no terminal.",
        callback=_is_quiet,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images that go through the network at a time.")]
OnErrorOption = Annotated[
    OnError,
    typer.Option(help="An unreadable image stops the command (raise) or is left out and listed (skip)."),
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Backbone weights, for a model that was saved without them."),
]


class OneLineErrors(TyperGroup):
    """The group of all commands: turns every error into one line on stderr and an exit code.

    0: success. 2: a wrong call or bad input (usage errors, :class:`~pydefect.errors.InputError`). 130:
    interrupted. 1: any other failure.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; exit at its end if `standalone_mode`, else return the exit code."""
        call = Call(debug=os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"))
        try:
            code = super().main(args, "pydefect", complete_var, standalone_mode=False, obj=call, **extra)
        except Exception as error:
            code = _report(error, call)
        if code == INTERRUPTED:
            say("pydefect: interrupted" + (f"; {call.resume}" if call.resume else ""))
        if standalone_mode:
            raise SystemExit(code or 0)
        return code or 0

    def invoke(self, ctx: Any) -> Any:
        """Run the command; catch an interruption first, of which Typer's versions make different things."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _report(error: Exception, call: Call) -> int:
    """Print an error; return the exit code."""
    if _is_usage_error(error):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        say(f"pydefect: error: {_one_line(_usage_text(error))}{hint}")
        return WRONG_CALL
    if call.debug:
        traceback.print_exception(error)
    text = _one_line(str(error))
    if isinstance(error, InputError) and call.context is not None:
        text = _as_typed(text, call.context)
    if not isinstance(error, PydefectError | OSError):
        # Nobody wrote this message for a user: at least say what it is and how to see more.
        text = f"{type(error).__name__}{': ' if text else ''}{text}"
        text += "" if call.debug else " (--debug shows where)"
    say(f"pydefect: error: {text}")
    return WRONG_CALL if isinstance(error, InputError) else FAILURE


def _is_usage_error(error: Exception) -> bool:
    # Some versions of Typer carry click inside, others use the installed one: there is no class to import
    # that serves both.
    return hasattr(error, "format_message") and getattr(error, "exit_code", None) == WRONG_CALL


def _usage_text(error: Any) -> str:
    text: str = error.format_message()
    # Versions of Typer that check by pydantic leave out what was given.
    details = getattr(error.__cause__, "errors", None)
    given = f"'{details()[0]['input']}'" if callable(details) else ""
    return text if given in text else f"{text}; {given} given"


def _as_typed(text: str, context: typer.Context) -> str:
    """Begin a message that begins with an argument of the function behind the command with its option."""
    found = re.match(r"\w+(?=: | is )", text)
    if found is None:
        return text
    name, rest = found[0], text[found.end() :]
    for parameter in context.command.params:
        # A list of methods may have one that is unknown.
        if parameter.name in (name, f"{name}s"):
            is_option = parameter.param_type_name == "option"
            typed = max(parameter.opts, key=len) if is_option else getattr(parameter, "metavar", None)
            return f"{(typed or name).rstrip('.')}{rest}"
    given = [entry.partition("=")[0].strip() for entry in context.params.get("settings") or ()]
    return f"--set {text}" if name in given else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def say(text: str) -> None:
    """Write a line for people to stderr, if anyone still reads it; stdout holds results only."""
    with suppress(OSError):
        typer.echo(text, err=True)


def duration(seconds: float) -> str:
    """12.3 s, or 4 min 05 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


# Arguments of the functions behind the commands that are given otherwise.
_NO_SETTINGS = ("images", "validation", "out", "progress")
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def parse_settings(given: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """Read the values of ``--set``.

    Parameters
    ----------
    given
        ``key=value`` each; the value is read as JSON, or as Python's True, False and None, and as plain text
        where it is none of these.
    options
        Settings that have an option of their own.

    Returns
    -------
    dict

    Raises
    ------
    typer.BadParameter
        An entry is not of this form, is a list that is no JSON, is given twice or belongs to an option of its
        own.
    """
    settings: dict[str, Any] = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise typer.BadParameter(f"{entry!r} is not of the form key=value", param_hint="--set")
        if key in _NO_SETTINGS:
            raise typer.BadParameter(f"{key} is no setting", param_hint="--set")
        if key in options:
            option = "--" + key.replace("_", "-")
            raise typer.BadParameter(f"{key} has an option of its own: {option}", param_hint="--set")
        if key in settings:
            raise typer.BadParameter(f"{key} is given twice", param_hint="--set")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            if value.lstrip().startswith(("(", "[")):
                raise typer.BadParameter(
                    f"{entry!r} is no list as JSON writes it, such as [1,2]", param_hint="--set"
                ) from None
            # Python's spelling is what the messages and the documentation have.
            settings[key] = _PYTHON_WORDS.get(value.strip(), value)
    return settings


def is_below(path: Path, folder: Path) -> bool:
    """Whether a file lies, or would lie, in a folder or below it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_new_file(path: Path, option: str, force: bool) -> None:
    """Refuse, before any work is done, to write a file that would be lost at the end or replace another.

    Raises
    ------
    typer.BadParameter
        The path is a folder, or exists and `force` is not set.
    InputError
        It lies below a file, or in a folder that may not be written to.
    """
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file in it", param_hint=option)
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} exists; --force replaces it", param_hint=option)
    check_file_writable(path, option)
