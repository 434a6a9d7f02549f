"""Which published weights can be used without a download."""

from __future__ import annotations

import os
from pathlib import Path


def cached_file(backbone: str) -> Path | None:
    """The file of a backbone's ImageNet weights where it already is on this machine, or None.

    Parameters
    ----------
    backbone
        A key of :data:`pydefect.backbones.IMAGENET_WEIGHTS`.
    """
    import torch

    from pydefect.backbones.weights import IMAGENET_WEIGHTS, WEIGHTS_DIR_VARIABLE

    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if os.environ.get(WEIGHTS_DIR_VARIABLE):
        folders.insert(0, Path(os.environ[WEIGHTS_DIR_VARIABLE]))
    files = (folder / IMAGENET_WEIGHTS[backbone].filename for folder in folders)
    return next((file for file in files if file.is_file()), None)
