"""``python -m pydefect``, and the command ``pydefect``."""

from __future__ import annotations

import signal

from pydefect.interruption import end_while_loading

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process."""
    # Not where a shell lets a command in the background ignore it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_while_loading)
    from pydefect import cli

    cli.main()


if __name__ == "__main__":
    main()
