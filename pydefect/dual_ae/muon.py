"""Muon with products that the processor is fast at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pydefect.features import cpu_has_amx

__all__ = ["Muon", "orthogonalised"]

# Those of torch.optim.Muon: the polynomial's slope at zero is as steep as it can be.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7


def orthogonalised(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix near 1.

    Parameters
    ----------
    matrix
        [n, m] float32.

    Returns
    -------
    Tensor
        [n, m] float32: five iterations of X <- a X + b (X X^T) X + c (X X^T)^2 X from the matrix over its
        Frobenius norm, as ``torch.optim.Muon`` takes them. A matrix of zeros stays one.

    Notes
    -----
    Every X is a polynomial in R = X X^T of the first one times the first X. R and the polynomial are small
    where the matrix is wide: iterating on them takes half of the operations. It needs float32, since what
    rounding adds to an eigenvalue of R that is nearly 0 grows twelvefold in an iteration.

    References
    ----------
    Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
    """
    if matrix.shape[0] > matrix.shape[1]:
        transposed: Tensor = orthogonalised(matrix.T).T
        return transposed
    start = matrix / torch.linalg.vector_norm(matrix).clamp_min(_SMALLEST_NORM)
    gram = start @ start.T
    factors: Tensor | None = None
    for iteration in range(_ITERATIONS):
        step = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        step.diagonal().add_(_A)
        factors = step if factors is None else factors @ step
        if iteration < _ITERATIONS - 1:
            gram = step @ gram @ step
    assert factors is not None
    found: Tensor = factors @ start
    return found


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with the step lengths of ``match_rms_adamw``, in the arithmetic that is fast.

    Torch's own has products of bfloat16 numbers on every processor. Without AMX they take several times as
    long as :func:`orthogonalised`, and hundreds of times where there is no AVX-512. Cards and processors with
    AMX keep them.

    Parameters
    ----------
    matrices
        [n, m] float32 each.
    rate, decay
        Learning rate and weight decay.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self._as_torch = matrices[0].device.type != "cpu" or cpu_has_amx()

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
