"""A frozen sequence of convolutions in the form that runs fastest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pydefect.backbones.convolution import Convolution, has_fused_convolutions

__all__ = ["FoldedSequence"]

_Step = Convolution | nn.Module


class FoldedSequence:
    """A frozen plain sequence for inference: what the ``nn.Sequential`` computes, sooner.

    On the CPU activations are fused into the convolutions. In float32 those at stride 1 are
    :func:`pydefect.ops.convolution`; the weights of others are laid out for the images' size, where PyTorch
    has what it takes (:func:`~pydefect.backbones.convolution.has_fused_convolutions`).

    Parameters
    ----------
    network
        Conv2d, ReLU (behind a convolution), AvgPool2d, Upsample and Dropout (left out). Its weights are
        copied: later changes to them are not seen.
    dtype
        float32 or bfloat16, of all arithmetic; products of bfloat16 are added in float32.
    """

    def __init__(self, network: nn.Sequential, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.device = next(network.parameters()).device
        self._fused = self.device.type == "cpu" and has_fused_convolutions(dtype)
        self._steps: list[_Step] = []
        self._activated: set[int] = set()
        for layer in network:
            if isinstance(layer, nn.Conv2d):
                self._steps.append(_frozen(layer, dtype).fastest(self._fused))
            elif isinstance(layer, nn.ReLU):
                assert isinstance(self._steps[-1], Convolution)
                self._activated.add(len(self._steps) - 1)
            elif isinstance(layer, nn.AvgPool2d | nn.Upsample):
                self._steps.append(layer)
            elif not isinstance(layer, nn.Dropout):
                raise TypeError(f"a folded sequence has no {type(layer).__name__}")
        # One assignment, when all are laid out: other threads may be in the middle of a call, and a call may
        # be interrupted.
        self._packed: tuple[torch.Size, list[_Step]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied, weights that are laid out: the next call does it anew."""
        return {**self.__dict__, "_packed": None}

    # Not inference_mode: what comes out may be compared with what is trained.
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Run the sequence.

        Parameters
        ----------
        images
            [B, C, H, W] floating point; fastest with channels last in memory.

        Returns
        -------
        Tensor
            [B, C', H', W'] of ``dtype``, channels last in memory.
        """
        x = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        # Laid out for the first size that comes; others do with weights that are laid out in every call.
        size, packed = images.shape[2:], self._packed
        steps = packed[1] if packed is not None and packed[0] == size else self._steps
        laid_out: list[_Step] | None = [] if self._fused and packed is None else None
        for number, step in enumerate(steps):
            if laid_out is not None:
                # For one image: layouts for one serve batches as well.
                shape = (1, x.shape[1], x.shape[2], x.shape[3])
                laid_out.append(step.packed(shape) if isinstance(step, Convolution) else step)
            if isinstance(step, Convolution):
                x = step.relu(x) if number in self._activated else step(x)
            else:
                x = step(x)
        if laid_out is not None:
            self._packed = size, laid_out
        return x


def _frozen(layer: nn.Conv2d, dtype: torch.dtype) -> Convolution:
    assert layer.bias is not None
    stride, padding = layer.stride, layer.padding
    assert not isinstance(padding, str)
    return Convolution(
        layer.weight.detach().to(dtype, copy=True).contiguous(memory_format=torch.channels_last),
        layer.bias.detach().to(dtype, copy=True),
        (stride[0], stride[1]),
        (padding[0], padding[1]),
    )
