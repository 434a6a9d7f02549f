"""Muon with products that the processor is fast at."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydefect.features import cpu_has_amx

__all__ = ["Muon", "orthogonalised"]

# Those of torch.optim.Muon: the polynomial's slope at zero is as steep as it can be.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
# Left out, such entries of a matrix of norm 1 change the result by less than rounding does.
_SMALLEST_ENTRY = 1e-12
# From where AMX is the faster; for fewer rows PyTorch lays matrices out for longer than it multiplies.
_ROWS_FOR_BFLOAT16 = 192


def orthogonalised(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix near 1.

    Parameters
    ----------
    matrix
        [n, m] float32 on the CPU.

    Returns
    -------
    Tensor
        [n, m] float32: five iterations of X <- a X + b (X X^T) X + c (X X^T)^2 X from the matrix over its
        Frobenius norm, as ``torch.optim.Muon`` takes them. A matrix of zeros stays one.

    Notes
    -----
    Every X is a polynomial in R = X X^T of an earlier one times that one. R and the polynomial are small
    where the matrix is wide: iterating on them takes half of the operations. What rounding adds to an
    eigenvalue of R that is nearly 0 grows twelvefold in an iteration. In float32 that is no matter in five;
    in bfloat16, which processors with AMX multiply several times as fast where matrices are large, R is
    computed anew from X after the first and the third.

    References
    ----------
    Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
    """
    if matrix.shape[0] > matrix.shape[1]:
        transposed: Tensor = orthogonalised(matrix.T).T
        return transposed
    start = matrix / torch.linalg.vector_norm(matrix).clamp_min(_SMALLEST_NORM)
    if cpu_has_amx() and len(matrix) >= _ROWS_FOR_BFLOAT16:
        return _iterated(start.bfloat16(), (1, 3)).float()
    # Products of smaller ones would be denormal numbers, at which a processor takes a hundred times as long.
    return _iterated(F.hardshrink(start, _SMALLEST_ENTRY), ())


def _iterated(x: Tensor, anew: Collection[int]) -> Tensor:
    """Take the five iterations, the Gram matrix from X itself again after so many of them."""
    gram = x @ x.T
    factors: Tensor | None = None
    for iteration in range(1, _ITERATIONS + 1):
        step = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        step.diagonal().add_(_A)
        factors = step if factors is None else factors @ step
        if iteration in anew:
            x = factors @ x
            gram, factors = x @ x.T, None
        elif iteration < _ITERATIONS:
            gram = step @ gram @ step
    assert factors is not None
    return factors @ x


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with the step lengths of ``match_rms_adamw``, and faster on processors.

    Torch's own multiplies bfloat16 numbers on every processor, which without AMX takes several times as long
    as :func:`orthogonalised`, hundreds of times where there is no AVX-512, and with AMX somewhat longer.
    Cards keep it.

    Parameters
    ----------
    matrices
        [n, m] float32 each.
    rate, decay
        Learning rate and weight decay.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self._as_torch = matrices[0].device.type != "cpu"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move along the gradients, all of which are there."""
        if self._as_torch:
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                step = orthogonalised(matrix.grad.lerp(mean, momentum))
                # The root mean square of such a step is near that of Adam's.
                length = 0.2 * math.sqrt(max(matrix.shape))
                matrix.mul_(1 - rate * group["weight_decay"]).add_(step, alpha=-rate * length)
        return loss
