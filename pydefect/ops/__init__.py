"""PyTorch operators with native kernels.

Every operator has a pure-PyTorch twin of the same name and signature in :mod:`pydefect.ops.reference`.
"""

from pydefect.ops.knn import knn

__all__ = ["knn"]
