"""PyTorch operators with native kernels.

Every operator has a pure-PyTorch twin of the same name and signature in :mod:`pydefect.ops.reference`.
Operators without a native kernel yet are the twin itself or a faster composition of PyTorch's own operators.
"""

from pydefect.ops.assign_unique import assign_unique
from pydefect.ops.channel_reunion import channel_reunion
from pydefect.ops.convolution import convolution, convolution_tiles, convolution_weight_gradient
from pydefect.ops.hypersphere import hypersphere
from pydefect.ops.kcenter_greedy import kcenter_greedy
from pydefect.ops.kcenter_reduce import kcenter_reduce
from pydefect.ops.knn import knn
from pydefect.ops.project_levels import project_levels
from pydefect.ops.relaxed_contrastive import relaxed_contrastive
from pydefect.ops.relu_avg_pool import relu_avg_pool
from pydefect.ops.score_maps import score_maps
from pydefect.ops.selective_fusion import selective_fusion
from pydefect.ops.spatial_reunion import spatial_reunion

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
