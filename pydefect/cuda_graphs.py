"""Functions on a card as CUDA graphs: one launch instead of hundreds, which small batches wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pydefect.randomness import DRAWING

__all__ = ["CapturedCall", "ReplayedCalls", "ReplayedSteps"]

# PyTorch asks for a few runs before a capture: workspaces are made and convolutions chosen in them.
_RUNS_BEFORE = 3


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what is launched within.

    On a stream of the right device: PyTorch's own one for captures belongs to the device that captured first.
    Other threads may go on using CUDA meanwhile, but for waiting for all of a device. PyTorch captures one
    graph at a time in a process, and up to 2.11 a capture takes the device's generator, so that nobody else
    may draw from it.
    """
    with DRAWING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        yield


class CapturedCall:
    """A function of tensors, captured once and replayed on new inputs.

    Parameters
    ----------
    function
        Of tensors on one CUDA device; waits for the device nowhere. Everything it does besides launching
        kernels happens here and never again.
    inputs
        Of the shapes, dtypes and memory layouts that all inputs will have.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self._inputs = [one.detach().clone() for one in inputs]
        with torch.cuda.device(self._inputs[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_RUNS_BEFORE):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with _capture(self._graph, stream):
                self._result = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the function.

        Returns
        -------
        Any
            What the function returned; the next call overwrites the tensors in it.
        """
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._result


class ReplayedCalls:
    """A function of one tensor that is captured for a shape when this has come a few times in a row.

    Parameters
    ----------
    function
        See :class:`CapturedCall`; inputs on the CPU are handed on to it as they are.
    state
        Returns what the function reads besides its input. A graph reads from the memory where this lay when
        it was captured: the object is kept alive as long, and where another one has come in its place the
        graph is dropped.
    """

    def __init__(self, function: Callable[[Tensor], Any], state: Callable[[], object]) -> None:
        self._function = function
        self._state = state
        self._read: object = None
        self._shape: torch.Size | None = None
        self._seen = 0
        self._captured: CapturedCall | None = None

    def __call__(self, given: Tensor) -> Any:
        """Run the function; what it returns may be overwritten by the next call."""
        if not given.is_cuda:
            return self._function(given)
        state = self._state()
        if given.shape != self._shape or state is not self._read:
            self._shape, self._read, self._seen, self._captured = given.shape, state, 0, None
        self._seen += 1
        if self._seen <= _RUNS_BEFORE:
            return self._function(given)
        if self._captured is None:
            self._captured = CapturedCall(self._function, [given])
        return self._captured(given)


class ReplayedSteps:
    """A function without arguments that changes tensors in place, captured after a few calls.

    The capture itself changes nothing: every call is one step, launched by itself or replayed.

    Parameters
    ----------
    function
        Of tensors on `device` that stay where they are; waits for the device nowhere.
    device
        A CUDA device.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Take a step."""
        self._calls += 1
        with torch.cuda.device(self._device):
            if self._calls <= _RUNS_BEFORE:
                self._function()
                return
            if self._graph is None:
                graph = torch.cuda.CUDAGraph()
                with _capture(graph, torch.cuda.Stream()):
                    self._function()
                self._graph = graph
            self._graph.replay()
