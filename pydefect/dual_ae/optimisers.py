"""The optimisers of distillation and training, behind one state."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pydefect.cuda_graphs import ReplayedSteps
from pydefect.dual_ae.muon import Muon

__all__ = ["Optimiser", "Optimisers"]

Optimiser = Literal["adam", "muon"]

# Side by side on a card: one matrix's products are too small to fill it, and each waits for the one before.
_STREAMS = 4
# What no gradient reaches any more, such as behind a ReLU that no image excites, fades to denormal numbers,
# at which a processor takes ten to a hundred times as long: Adam's moment in 180 steps from here.
_FADED = 1e-30
_STEPS_BETWEEN_SWEEPS = 100


@dataclass(frozen=True)
class _Part:
    """An optimiser of some of the parameters that its kind has.

    Attributes
    ----------
    kind
        ``"adam"`` or ``"muon"``.
    optimiser
        Of these parameters.
    numbers
        The places of its parameters among all of the kind, which the state is named after.
    shares
        Learning rates of its groups over the first rate.
    stream
        Where its kernels are launched; None: where the step is.
    """

    kind: Optimiser
    optimiser: torch.optim.Optimizer
    numbers: Sequence[int]
    shares: Sequence[float]
    stream: torch.cuda.Stream | None = None


class Optimisers:
    """Adam for all parameters, or Muon for the convolutions' weights and Adam for the others.

    Muon takes matrices: a convolution's weights are one with a row for every output channel. The matrices
    share the weights' memory, so that nothing is copied back.

    Parameters
    ----------
    network
        Its convolutions' weights are channels last in memory where Muon is asked for.
    optimiser
        ``"muon"``: the convolutions' weights move in directions whose singular values are all alike, by the
        size of Adam's steps (:class:`pydefect.dual_ae.muon.Muon`).
    rate
        Learning rate.
    decay
        Weight decay of Adam, which adds it to the gradient.
    muon_decay
        Weight decay of Muon, which takes ``rate * muon_decay`` off the matrices in every step. Its steps are
        equally long whatever the gradient, so that matrices grow with their number where nothing holds them.
    gentle, gentle_rate
        Layers that Adam trains, with a learning rate of their own; it rises and falls with `rate`.
    captured
        Gradients come into the same memory in every step: on a card a step is then a CUDA graph. One of Muon
        has more than a thousand kernels, and launching them takes longer than running them.
    """

    def __init__(
        self,
        network: nn.Module,
        optimiser: Optimiser,
        rate: float,
        decay: float,
        *,
        muon_decay: float,
        gentle: Collection[nn.Module] = (),
        gentle_rate: float = 0.0,
        captured: bool = False,
    ) -> None:
        self._weights = [
            module.weight
            for module in network.modules()
            if isinstance(module, nn.Conv2d) and optimiser == "muon" and module not in gentle
        ]
        self._matrices = [nn.Parameter(_as_matrix(weight.detach())) for weight in self._weights]
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            assert weight.data_ptr() == matrix.data_ptr(), "the weights must be channels last"
        slow = [parameter for module in gentle for parameter in module.parameters()]
        apart = {id(one) for one in (*slow, *self._weights)}
        fast = [parameter for parameter in network.parameters() if id(parameter) not in apart]
        self._others = [*fast, *slow]
        self._captured = captured
        device = next(network.parameters()).device
        self._on_processor = device.type == "cpu"
        on_card = captured and device.type == "cuda"
        # What a graph multiplies its steps by has to be a share of something.
        self._rate = rate or 1.0
        groups = [{"params": fast, "lr": self._rate}, {"params": slow, "lr": gentle_rate}]
        adam = torch.optim.Adam(
            [group for group in groups if group["params"]],
            weight_decay=decay,
            fused=True,
            capturable=on_card,
        )
        shares = [group["lr"] / self._rate for group in adam.param_groups]
        self._parts = []
        streams = [torch.cuda.Stream(device) for _ in range(_STREAMS)] if on_card else [None]
        for number, stream in enumerate(streams):
            mine = range(number, len(self._matrices), len(streams))
            if mine:
                muon = Muon([self._matrices[one] for one in mine], self._rate, muon_decay)
                self._parts.append(_Part("muon", muon, mine, [1.0], stream))
        self._parts.append(_Part("adam", adam, range(len(self._others)), shares))
        if captured:
            self._before = [one.detach().clone() for one in (*self._matrices, *self._others)]
            self._share = torch.ones((), device=device)
            self._take_step = ReplayedSteps(self._step_by_share, device) if on_card else self._step_by_share

    def step(self, rate: float) -> None:
        """Take a step along the parameters' gradients, all of which have one.

        Parameters
        ----------
        rate
            Learning rate of this step, 0 or more.
        """
        if self._captured:
            self._share.fill_(rate / self._rate)
            self._take_step()
            return
        for part in self._parts:
            for group, share in zip(part.optimiser.param_groups, part.shares, strict=True):
                group["lr"] = rate * share
        if self._on_processor and self._steps_taken() % _STEPS_BETWEEN_SWEEPS == 0:
            self._sweep()
        self._step()

    def _steps_taken(self) -> int:
        """Ask Adam, which has parameters in every network, and whose state remembers across runs."""
        state = self._parts[-1].optimiser.state
        return int(next(iter(state.values()))["step"]) if state else 0

    @torch.no_grad()
    def _sweep(self) -> None:
        """Put 0 where parameters and moments have faded."""
        for part in self._parts:
            for parameter, moments in part.optimiser.state.items():
                for values in (parameter, *moments.values()):
                    values.masked_fill_(values.abs() < _FADED, 0)

    def _step(self) -> None:
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            assert weight.grad is not None
            matrix.grad = _as_matrix(weight.grad)
        streams = [part.stream for part in self._parts if part.stream is not None]
        for part in self._parts:
            if part.stream is not None:
                part.stream.wait_stream(torch.cuda.current_stream(part.stream.device))
            # None: wherever it is.
            with torch.cuda.stream(part.stream):
                part.optimiser.step()
        for stream in streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    @torch.no_grad()
    def _step_by_share(self) -> None:
        """Take a step at the first rate and go back by a share of it.

        The rate is a number that a graph holds as it was when it was captured. Both optimisers move the
        parameters in proportion to it.
        """
        parameters: list[Tensor] = [*self._matrices, *self._others]
        torch._foreach_copy_(self._before, parameters)
        self._step()
        torch._foreach_sub_(parameters, self._before)
        torch._foreach_mul_(parameters, self._share)
        torch._foreach_add_(parameters, self._before)

    def state(self) -> dict[str, Tensor]:
        """What a later run needs to go on."""
        return {
            f"{part.kind}.{part.numbers[index]}.{key}": value
            for part in self._parts
            for index, moments in part.optimiser.state_dict()["state"].items()
            for key, value in moments.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`; other names are ignored."""
        moments: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind in ("adam", "muon"):
                number, key = rest.split(".")
                moments.setdefault((kind, int(number)), {})[key] = value
        for part in self._parts:
            parameters = self._matrices if part.kind == "muon" else self._others
            state = part.optimiser.state_dict()
            state["state"] = {
                index: {key: _laid_out_as(parameters[number], value) for key, value in found.items()}
                for index, number in enumerate(part.numbers)
                if (found := moments.get((part.kind, number)))
            }
            part.optimiser.load_state_dict(state)


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Copy a moment into the memory layout of its parameter: fused updates go through memory as it lies."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value) if value.ndim else value


def _as_matrix(weight: Tensor) -> Tensor:
    """[out, in, h, w], channels last in memory, to [out, h w in], of the same memory."""
    return weight.permute(0, 2, 3, 1).contiguous().view(weight.shape[0], -1)
