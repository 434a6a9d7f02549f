"""The patch description network (PDN): teacher and student, and where in the image its cells lie.

The geometry is that of continuous image coordinates, as in :mod:`pydefect.preprocessing`: pixel i covers
[i, i + 1). A cell of the output sees 33 x 33 pixels; the centres of neighbouring cells are 4 pixels apart.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, cast

from torch import Tensor, nn

from pydefect.dual_ae.convolution import TrainedConvolution
from pydefect.ops import relu_avg_pool

__all__ = ["PDN", "PDN_CHANNELS", "RECEPTIVE_FIELD", "STRIDE", "Size", "first_centre", "output_size"]

Size = Literal["small", "medium"]

PDN_CHANNELS = 384
RECEPTIVE_FIELD = 33
STRIDE = 4

# What padding adds before the first pixel: 3 and 1 at stride 1, 3 and 1 at stride 2, 1 at stride 4.
_PADDED_BEFORE = 3 + 1 + 2 * (3 + 1) + 4


class _Pooling(nn.AvgPool2d):
    """The mean of 2 x 2 cells of what comes behind a ReLU, which changes nothing when it is taken again.

    PyTorch's own kernels for channels_last take a card a third of a whole training step.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, (H + 2 p) // 2, (W + 2 p) // 2], p the padding."""
        return relu_avg_pool(maps, cast(int, self.padding))


class PDN(nn.Sequential):
    """Patch description network; its entries have the names of EfficientAD's published files (0.weight, ...).

    Parameters
    ----------
    size
        ``"small"``: conv4x4 3-128, avgpool, conv4x4 128-256, avgpool, conv3x3 256-256, conv4x4 256-C;
        ``"medium"``: conv4x4 3-256, avgpool, conv4x4 256-512, avgpool, conv1x1 512-512, conv3x3 512-512,
        conv4x4 512-C, conv1x1 C-C. A ReLU follows every convolution but the last.
    out_channels
        C: 384 for a teacher, 768 for a student.
    padding
        True: zeros around every map, 256 pixels give 64 cells; False: 256 pixels give 56, none of which sees
        anything but pixels.

    References
    ----------
    Batzner et al., EfficientAD, WACV 2024, tables 6 and 7; Liang and Chen, dual autoencoder for industrial
    anomaly detection, section 1.1.
    """

    def __init__(self, size: Size = "small", out_channels: int = PDN_CHANNELS, padding: bool = False) -> None:
        pad = int(padding)
        first, second = (128, 256) if size == "small" else (256, 512)
        # ReLUs in place take a processor several times as long in bfloat16.
        layers: list[nn.Module] = [
            TrainedConvolution(3, first, 4, padding=3 * pad),
            nn.ReLU(),
            _Pooling(2, 2, padding=pad),
            TrainedConvolution(first, second, 4, padding=3 * pad),
            nn.ReLU(),
            _Pooling(2, 2, padding=pad),
        ]
        if size == "medium":
            layers += [TrainedConvolution(second, second, 1), nn.ReLU()]
        layers += [
            TrainedConvolution(second, second, 3, padding=pad),
            nn.ReLU(),
            TrainedConvolution(second, out_channels, 4),
        ]
        if size == "medium":
            layers += [nn.ReLU(), TrainedConvolution(out_channels, out_channels, 1)]
        super().__init__(*layers)
        self.size = size
        self.out_channels = out_channels
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        """Describe the patches of a batch.

        Parameters
        ----------
        images
            [B, 3, H, W] float, normalised with ImageNet's mean and standard deviation; H and W at least 33
            (without padding). Fastest with channels last in memory, and on processors and cards with bfloat16
            under ``torch.autocast``.

        Returns
        -------
        Tensor
            [B, out_channels, h, w], (h, w) = :func:`output_size`.
        """
        described: Tensor = self[-1](self.trunk(images))
        return described

    def trunk(self, images: Tensor) -> Tensor:
        """Run all layers but the last: [B, 3, H, W] to [B, C', h', w'], what the last convolution takes."""
        maps = images
        for layer, following in pairwise(self):
            # The pooling takes the ReLU in front of it along.
            if not isinstance(following, _Pooling):
                maps = layer(maps)
        return maps


def output_size(image_size: tuple[int, int], padding: bool) -> tuple[int, int]:
    """Size of a PDN's output, small or medium.

    Parameters
    ----------
    image_size
        (height, width) in pixels.
    padding
        Of the network.

    Returns
    -------
    tuple of int
        (h, w) cells; not positive where the image is too small for the network.
    """

    def cells(side: int) -> int:
        pad = int(padding)
        side += 6 * pad - 3
        side = (side + 2 * pad) // 2
        side += 6 * pad - 3
        side = (side + 2 * pad) // 2
        return side + 2 * pad - 2 - 3

    return cells(image_size[0]), cells(image_size[1])


def first_centre(padding: bool) -> float:
    """Where the first cell's receptive field has its centre, in pixels from the image's edge.

    Cell i sees the pixels [s + 4 i, s + 4 i + 33), s = 0 without padding and -16 with it: its centre lies at
    s + 16.5 + 4 i. EfficientAD's code spreads the cells over the image as if they were pixels of a smaller
    one, which is 1.5 pixels off.
    """
    return RECEPTIVE_FIELD / 2 - _PADDED_BEFORE * int(padding)
