"""EfficientAD's autoencoder, for images of any size."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from pydefect.dual_ae.convolution import SmallConvolution

__all__ = ["Autoencoder", "decoder_sizes"]

Size2 = tuple[int, int]


def decoder_sizes(image_size: Size2) -> list[Size2]:
    """Sizes to which the decoder's maps are resized before each of its first six convolutions.

    Returns
    -------
    list of tuple
        For 256 x 256: 3, 8, 15, 32, 63, 127, as EfficientAD's code has them.
    """
    height, width = image_size
    steps = ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))
    return [(max(1, height // by - less), max(1, width // by - less)) for by, less in steps]


class Autoencoder(nn.Sequential):
    """Image to 64 numbers to a map of features: [B, 3, H, W], normalised, to [B, channels, h, w].

    Parameters
    ----------
    image_size
        (H, W) of the images in pixels, at least 32 each.
    map_size
        (h, w) of the map, that of the teacher's.
    channels
        Of the map.
    dropout
        Share of the decoder's values that a training pass leaves out.

    Notes
    -----
    The bottleneck is 64 x 1 x 1 for every image size: its convolution is as large as the encoder's last map,
    8 x 8 for 256 x 256.

    References
    ----------
    Batzner et al., EfficientAD, WACV 2024, table 8.
    """

    def __init__(self, image_size: Size2, map_size: Size2, channels: int = 384, dropout: float = 0.2) -> None:
        layers: list[nn.Module] = []
        for inner, outer in pairwise((3, 32, 32, 64, 64, 64)):
            layers += [nn.Conv2d(inner, outer, 4, 2, 1), nn.ReLU(inplace=True)]
        layers.append(nn.Conv2d(64, 64, (image_size[0] // 32, image_size[1] // 32)))
        for size in decoder_sizes(image_size):
            layers += [
                nn.Upsample(size, mode="bilinear"),
                SmallConvolution(64, 64, 4, padding=2),
                nn.ReLU(),
                nn.Dropout(dropout),
            ]
        layers += [
            nn.Upsample(map_size, mode="bilinear"),
            SmallConvolution(64, 64, 3, padding=1),
            nn.ReLU(),
            SmallConvolution(64, channels, 3, padding=1),
        ]
        super().__init__(*layers)
