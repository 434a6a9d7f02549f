"""Images and data sets: reading them, and drawing a procedural one."""

from pydefect.data.images import Image, ImageCollection, SkippedImage, open_images, read_image
from pydefect.data.layouts import Dataset, Sample, read_dataset, read_mask, training_images
from pydefect.data.procedural import render_product, write_dataset
from pydefect.data.textures import texture

__all__ = [
    "Dataset",
    "Image",
    "ImageCollection",
    "Sample",
    "SkippedImage",
    "open_images",
    "read_dataset",
    "read_image",
    "read_mask",
    "render_product",
    "texture",
    "training_images",
    "write_dataset",
]
