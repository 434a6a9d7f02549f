"""The training loop of the baselines that learn something."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pydefect.baselines.detector import Context
from pydefect.errors import PydefectError
from pydefect.features import FeatureCache
from pydefect.interruption import saved_between_steps

__all__ = ["train"]

# Seconds between checkpoints inside an epoch; saving takes a few milliseconds.
_CHECKPOINT_INTERVAL = 20.0


def train(
    module: nn.Module,
    loss: Callable[[list[Tensor], torch.Generator], Tensor],
    cache: FeatureCache,
    indices: Sequence[int],
    config: Any,
    context: Context,
    *,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Train a module on cached features with AdamW, from where the checkpoint left off.

    Parameters
    ----------
    module
        Its parameters that want a gradient are trained; all of its state is kept in the checkpoint.
    loss
        Of a batch, [B, C_l, H_l, W_l] a level, and a generator for random choices in this step.
    cache, indices
        The training images.
    config
        With ``epochs``, ``batch_size``, ``learning_rate`` and ``weight_decay``.
    context
        Seed, device, checkpoint, progress.
    after_step
        Called after every step of the optimiser.

    Returns
    -------
    list of float
        Mean loss of every epoch.

    Raises
    ------
    PydefectError
        A loss is not finite.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, amsgrad=True
    )
    history: list[float] = []
    step, total = 0, 0.0
    saved = context.checkpoint.load(context.stage) if context.checkpoint else None
    if saved is not None:
        _restore(module, optimiser, saved[0], context.device)
        history, step, total = saved[1]["history"], saved[1]["step"], saved[1]["total"]

    def save() -> None:
        if context.checkpoint is not None:
            state = {"history": history, "step": step, "total": total}
            context.checkpoint.save(context.stage, _tensors(module, optimiser), state)

    while len(history) < config.epochs:
        epoch = len(history) + 1
        order = torch.randperm(len(indices), generator=context.generator(epoch)).tolist()
        steps = -(-len(order) // config.batch_size)
        if step == 0:
            context.report(f"epoch {epoch}", 0, steps)
        with saved_between_steps(save if context.checkpoint else None, _CHECKPOINT_INTERVAL) as between_steps:
            while step < steps:
                chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
                levels = cache.get([indices[image] for image in chosen], context.device)
                value = loss(levels, context.generator(epoch, step + 1))
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                optimiser.step()
                if after_step is not None:
                    after_step()
                total += float(value.detach())
                # In every step: a checkpoint could not hold it.
                if not math.isfinite(total):
                    raise PydefectError(
                        f"training: the loss of epoch {epoch} is not finite; lower learning_rate"
                    )
                step += 1
                context.report(f"epoch {epoch}", step, steps)
                between_steps()
        history.append(total / steps)
        step, total = 0, 0.0
        save()
    return history


def _tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in moments.items()}
    return tensors


def _restore(
    module: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], device: torch.device
) -> None:
    module.load_state_dict(
        {
            name.removeprefix("module."): value.to(device)
            for name, value in tensors.items()
            if name.startswith("module.")
        }
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            # AdamW counts its steps on the CPU.
            moments.setdefault(int(index), {})[key] = value if key == "step" else value.to(device)
    state = optimiser.state_dict()
    state["state"] = moments
    optimiser.load_state_dict(state)
