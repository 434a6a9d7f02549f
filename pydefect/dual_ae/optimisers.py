"""The optimisers of distillation and training, behind one state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pydefect.cuda_graphs import ReplayedSteps

__all__ = ["Optimiser", "Optimisers"]

Optimiser = Literal["adam", "muon"]


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
        size of Adam's steps (``torch.optim.Muon``, ``match_rms_adamw``).
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
        on_card = captured and device.type == "cuda"
        # What a graph multiplies its steps by has to be a share of something.
        self._rate = rate or 1.0
        groups = [{"params": fast, "lr": self._rate}, {"params": slow, "lr": gentle_rate}]
        self._all: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.Adam(
                [group for group in groups if group["params"]],
                weight_decay=decay,
                fused=True,
                capturable=on_card,
            )
        }
        if self._matrices:
            self._all["muon"] = torch.optim.Muon(
                self._matrices, lr=self._rate, weight_decay=muon_decay, adjust_lr_fn="match_rms_adamw"
            )
        self._shares = {
            name: [group["lr"] / self._rate for group in optimiser.param_groups]
            for name, optimiser in self._all.items()
        }
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
        for name, optimiser in self._all.items():
            for group, share in zip(optimiser.param_groups, self._shares[name], strict=True):
                group["lr"] = rate * share
        self._step()

    def _step(self) -> None:
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            assert weight.grad is not None
            matrix.grad = _as_matrix(weight.grad)
        for optimiser in self._all.values():
            optimiser.step()

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
            f"{name}.{index}.{key}": value
            for name, optimiser in self._all.items()
            for index, moments in optimiser.state_dict()["state"].items()
            for key, value in moments.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`; other names are ignored."""
        for name, parameters in (("adam", self._others), ("muon", self._matrices)):
            moments: dict[int, dict[str, Tensor]] = {}
            for full_name, value in tensors.items():
                owner, _, rest = full_name.partition(".")
                if owner != name:
                    continue
                index, key = rest.split(".")
                if value.ndim:
                    # In the parameter's own memory layout: the fused update goes through memory as it lies.
                    value = torch.empty_like(parameters[int(index)], requires_grad=False).copy_(value)
                moments.setdefault(int(index), {})[key] = value
            if name in self._all:
                state = self._all[name].state_dict()
                state["state"] = moments
                self._all[name].load_state_dict(state)


def _as_matrix(weight: Tensor) -> Tensor:
    """[out, in, h, w], channels last in memory, to [out, h w in], of the same memory."""
    return weight.permute(0, 2, 3, 1).contiguous().view(weight.shape[0], -1)
