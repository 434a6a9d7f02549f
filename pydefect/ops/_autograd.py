"""What the operators with a native gradient share."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

__all__ = ["differentiable_once"]


def differentiable_once(operator: str, *backwards: str) -> None:
    """Let the operators that make an operator's gradient raise where they are differentiated themselves.

    Without this PyTorch's answer is a warning and a gradient without the terms that go through them.

    Parameters
    ----------
    operator
        Its name, without the namespace; the reference has the same.
    backwards
        Names of the registered operators that its backward pass calls. They raise a RuntimeError then.
    """

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(
            f"{operator}: its gradient cannot be differentiated again; that of "
            f"pydefect.ops.reference.{operator} can"
        )

    for backward in backwards:
        torch.library.register_autograd(f"pydefect::{backward}", refuse)
