"""Progress bars for long work, on standard error."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

__all__ = ["ProgressBars"]


class ProgressBars:
    """Shows one bar after the other: a bar appears with the first call of its description and goes with the
    last step.

    Parameters
    ----------
    enabled
        False: show nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        # Services and windowed programs have no standard error.
        self._enabled = enabled and sys.stderr is not None
        self._bar: tqdm[Any] | None = None
        self._description: str | None = None

    def __call__(self, description: str, done: int, total: int | None) -> None:
        """Say that ``done`` of ``total`` steps of ``description`` are done; None: an unknown number."""
        if not self._enabled:
            return
        if description != self._description:
            self.close()
            # A resumed stage begins in the middle; a first step that takes long is announced with none done.
            self._bar = tqdm(
                total=total, initial=max(0, done - 1), desc=description, leave=False, dynamic_ncols=True
            )
            self._description = description
        assert self._bar is not None
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._description = None
