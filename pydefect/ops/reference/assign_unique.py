"""Each centre takes its nearest patch that no earlier centre has taken (ConPatch, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assign_unique"]


def assign_unique(bank: Tensor, patches: Tensor) -> Tensor:
    """Find the patches C^NN of algorithm 1, lines 4 to 7.

    Parameters
    ----------
    bank
        [M, D] float: centres, in the order in which they choose.
    patches
        [N, D] float, N >= M: patch representations of one image.

    Returns
    -------
    Tensor
        [M] int64, all different: the patch that each centre takes; ties go to the lower patch index.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, algorithm 1.
    """
    squared = bank.square().sum(1, keepdim=True) + patches.square().sum(1) - 2 * (bank @ patches.T)
    taken = torch.empty(len(bank), dtype=torch.int64, device=bank.device)
    for centre in range(len(bank)):
        patch = squared[centre].argmin()
        taken[centre] = patch
        squared[:, patch] = torch.inf
    return taken
