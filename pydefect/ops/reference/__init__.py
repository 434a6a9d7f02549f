"""Pure-PyTorch twins of the operators: slow, obvious, and what tests and benchmarks compare with."""

from pydefect.ops.reference.assign_unique import assign_unique
from pydefect.ops.reference.channel_reunion import channel_reunion
from pydefect.ops.reference.convolution import convolution, convolution_tiles, convolution_weight_gradient
from pydefect.ops.reference.hypersphere import hypersphere
from pydefect.ops.reference.kcenter_greedy import kcenter_greedy
from pydefect.ops.reference.kcenter_reduce import kcenter_reduce
from pydefect.ops.reference.knn import knn
from pydefect.ops.reference.project_levels import project_levels
from pydefect.ops.reference.relaxed_contrastive import relaxed_contrastive
from pydefect.ops.reference.relu_avg_pool import relu_avg_pool
from pydefect.ops.reference.score_maps import score_maps
from pydefect.ops.reference.selective_fusion import selective_fusion
from pydefect.ops.reference.spatial_reunion import spatial_reunion

__all__ = [
    "assign_unique",
    "channel_reunion",
    "convolution",
    "convolution_tiles",
    "convolution_weight_gradient",
    "hypersphere",
    "kcenter_greedy",
    "kcenter_reduce",
    "knn",
    "project_levels",
    "relaxed_contrastive",
    "relu_avg_pool",
    "score_maps",
    "selective_fusion",
    "spatial_reunion",
]
