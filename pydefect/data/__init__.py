from pydefect.data.images import Image, ImageCollection, SkippedImage, open_images, read_image
from pydefect.data.layouts import Dataset, Sample, read_dataset, read_mask, training_images

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
    "training_images",
]
