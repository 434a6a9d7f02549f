"""Pure-PyTorch twins of the operators: slow, obvious, and what tests and benchmarks compare with."""

from pydefect.ops.reference.knn import knn

__all__ = ["knn"]
