"""A frozen backbone from its name and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pydefect.backbones.backbone import Backbone
from pydefect.backbones.resnet import ARCHITECTURES, ResNet
from pydefect.backbones.weights import IMAGENET_WEIGHTS, load_state_dict
from pydefect.declared import BACKBONES, DeclaredNames
from pydefect.errors import InputError
from pydefect.randomness import seeded

__all__ = ["BACKBONE_NAMES", "build_backbone"]

BACKBONE_NAMES = DeclaredNames("backbone", BACKBONES, ARCHITECTURES)
"""All backbones' names: the ResNets, and those that installed packages declare."""

_LEVELS = (1, 2, 3)


def build_backbone(
    name: str, weights: str | Mapping[str, Tensor] = "imagenet", *, seed: int = 0, progress: bool = True
) -> Backbone:
    """Build a frozen backbone in eval mode.

    Parameters
    ----------
    name
        One of :data:`BACKBONE_NAMES`.
    weights
        ``"imagenet"`` (torchvision's published file; of a declared backbone what its package takes),
        ``"random"`` (of a ResNet He initialisation, of others what they begin with, from ``seed``: for
        demonstrations and tests, when no file is at hand), the path of a ``.pth``, ``.safetensors`` or
        ``.npz`` file with torchvision's names, of a declared backbone with those of its ``state_dict``, or
        such a state dict itself.
    seed
        For ``weights="random"`` only.
    progress
        Show a progress bar while downloading.

    Returns
    -------
    Backbone
        A :class:`~pydefect.backbones.resnet.ResNet` unless a package declares it. No parameter requires a
        gradient.

    Raises
    ------
    InputError
        Unknown name; a file that cannot be read, lacks a parameter or holds one of a wrong shape; a declared
        backbone that cannot be built, or not load what it calls its weights.
    WeightsNotFoundError
        The file does not exist, or ``"imagenet"`` is neither cached nor downloadable.
    """
    declared = BACKBONE_NAMES.load(name, _unusable)
    with seeded(seed):
        network: Backbone = ResNet(ARCHITECTURES[name]) if declared is None else _built(declared, name)
    if weights == "random":
        if type(network) is ResNet:
            network.initialise(seed)
    elif weights == "imagenet" and declared is not None:
        with seeded(seed):
            _load_pretrained(network, name)
    else:
        state = _state_dict(name, weights, progress) if isinstance(weights, str) else weights
        source = f"weights {weights!r}" if isinstance(weights, str) else "weights"
        _load_checked(network, state, name, source)
    return network.requires_grad_(False).eval()


def _unusable(found: Any, _name: str) -> str | None:
    """What keeps an object from being a backbone's class; None: nothing."""
    if not isinstance(found, type) or not issubclass(found, Backbone):
        return "is no subclass of pydefect.backbones.Backbone"
    if found.__abstractmethods__:
        return f"lacks {', '.join(sorted(found.__abstractmethods__))}"
    return None


def _built(declared: type[Backbone], name: str) -> Backbone:
    try:
        network = declared()
    except Exception as error:
        raise InputError(
            f"backbone: {name!r}, which {BACKBONE_NAMES.package_of(name)} declares, cannot be built: "
            f"{type(error).__name__}: {error}"
        ) from error
    if others := [key for key, value in network.state_dict().items() if not isinstance(value, Tensor)]:
        raise InputError(
            f"backbone: {name!r}, which {BACKBONE_NAMES.package_of(name)} declares, has {others[0]!r} in its "
            "state_dict, which is no tensor: model files hold nothing else"
        )
    for attribute in ("channels", "strides"):
        values = getattr(network, attribute, None)
        if (
            not isinstance(values, Mapping)
            or sorted(values) != list(_LEVELS)
            or not all(isinstance(value, int) and value >= 1 for value in values.values())
            or (attribute == "strides" and not values[1] <= values[2] <= values[3])
        ):
            raise InputError(
                f"backbone: {name!r}, which {BACKBONE_NAMES.package_of(name)} declares, has {attribute} "
                f"{values!r}; needed is a whole number for each of the levels 1, 2, 3"
                f"{', the smallest stride first' if attribute == 'strides' else ''}"
            )
    return network


def _load_pretrained(network: Backbone, name: str) -> None:
    try:
        network.load_pretrained()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"weights: {BACKBONE_NAMES.package_of(name)}, which declares the backbone {name!r}, cannot load "
            f"the published ones: {type(error).__name__}: {error}"
        ) from error


def _state_dict(name: str, weights: str, progress: bool) -> Mapping[str, Tensor]:
    if weights != "imagenet":
        return load_state_dict(weights, progress=progress)
    if name not in IMAGENET_WEIGHTS:
        raise InputError(f"weights: no ImageNet file is published for backbone {name!r}; give a file")
    return load_state_dict(name, progress=progress)


def _load_checked(network: Backbone, state: Mapping[str, Tensor], name: str, source: str) -> None:
    wanted = network.state_dict()
    # torchvision's oldest files and converted ones have no step counter; eval mode never reads it.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        whose = f"{name} with torchvision's names" if isinstance(network, ResNet) else name
        raise InputError(
            f"{source}: not a {whose}: {len(missing)} parameters are missing, such as {missing[0]!r}"
        )
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            raise InputError(
                f"{source}: {key!r} has shape {tuple(state[key].shape)}; {name} needs {tuple(value.shape)}"
            )
    network.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})
