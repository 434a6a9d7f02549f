"""A convolution with its residual sum and its activation, by a quarter of the products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pydefect import _native
from pydefect.ops import _library
from pydefect.ops._maps import to_positions
from pydefect.ops.reference.convolution import check_convolution, check_convolution_weight_gradient

__all__ = ["convolution", "convolution_tiles", "convolution_weight_gradient"]

_library.load_cpu_library()

# Below these channels more is padded than computed.
_LEAST_INPUTS, _LEAST_OUTPUTS = 16, 32
# Once: it is chosen when the library is loaded, and torch.compile does not see through the question.
_WIDE_VECTORS = _native.build_info()["cpu_level_active"] != "portable"


def convolution(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    padding: int = 0,
    relu: bool = False,
    residual: Tensor | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """Convolve maps at stride 1, add a residual, and take what is above zero.

    ``relu(conv2d(maps, weight, bias, padding=padding) + residual)`` by Winograd's minimal filtering: tiles
    of 6 x 6 pixels and the kernels are transformed so that a product of two numbers does what a sum of four
    did. The additions of the transforms are few beside the products, which are sums over channels.

    Parameters
    ----------
    maps
        [B, C, H, W], B >= 0; fastest with channels last in memory.
    weight
        [O, C, k, k], of the dtype of `maps`, as the others.
    bias
        [O].
    padding
        Rows and columns of zeros around every map, 0 to k - 1.
    relu
        Take the maximum with zero at the end; NaN stays.
    residual
        [B, O, H + 2 padding - k + 1, W + 2 padding - k + 1], added before; None: none.
    tiles
        What :func:`convolution_tiles` made of `weight`, which is not read then; None: it is PyTorch's
        convolution that is taken.

    Returns
    -------
    Tensor
        [B, O, H + 2 padding - k + 1, W + 2 padding - k + 1], of the dtype and memory layout of `maps`. With
        `tiles` the same bit for bit for every number of threads, and for an image whatever else is in its
        batch; another instruction set may change last digits.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype or device.

    Notes
    -----
    Errors are some units in 10**6 of the largest value, twice to three times those of sums in float32
    (Lavin and Gray, section 7; ``tests/ops/test_convolution.py``). Where NaN or infinity lies in a map, the
    whole tiles are not finite, which reach up to 5 pixels further than in a convolution.

    Native on the CPU, in float32. On a card, in other dtypes and where a gradient is asked for it is
    PyTorch's convolution, which takes autocast's type where that is on, and `tiles` are not read.

    References
    ----------
    Winograd, Arithmetic complexity of computations, 1980; Lavin and Gray, Fast algorithms for convolutional
    neural networks, CVPR 2016.

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import convolution, convolution_tiles
    >>> maps, weight = torch.ones(1, 16, 8, 8), torch.ones(32, 16, 3, 3)
    >>> convolution(maps, weight, torch.zeros(32), tiles=convolution_tiles(weight)).shape
    torch.Size([1, 32, 6, 6])
    """
    check_convolution(maps, weight, bias, padding, residual)
    given = [maps, weight, bias, *([] if residual is None else [residual])]
    wants_gradient = torch.is_grad_enabled() and any(one.requires_grad for one in given)
    if tiles is None or not _has_kernel(weight, weight.shape[2:]) or wants_gradient:
        result = F.conv2d(maps, weight, bias, padding=padding)
        if residual is not None:
            result = result + residual
        return result.relu() if relu else result
    output: Tensor = torch.ops.pydefect.convolution(
        to_positions(maps),
        tiles,
        bias,
        None if residual is None else to_positions(residual),
        weight.shape[2],
        padding,
        relu,
    )
    result = output.permute(0, 3, 1, 2)
    # Maps of one pixel or channel have both layouts: they do not make all that follows contiguous.
    both = maps.is_contiguous(memory_format=torch.channels_last)
    return result.contiguous() if maps.is_contiguous() and not both else result


def convolution_tiles(weight: Tensor) -> Tensor | None:
    """Transform the weights of a convolution at stride 1, once for all calls in which they are the same.

    Parameters
    ----------
    weight
        [O, C, k, k].

    Returns
    -------
    Tensor or None
        [ceil(O / 32), 36, C in whole blocks of 16, 32] float32; None where PyTorch's convolution is the
        faster one or the only one: on a card, for dtypes other than float32, kernels other than 3 x 3 and
        4 x 4, few channels (below 16 in, 32 out), and processors without AVX2.
    """
    outputs, inputs = weight.shape[:2]
    if not _worth_it(weight, inputs, outputs, weight.shape[2:]):
        return None
    tiles: Tensor = torch.ops.pydefect.convolution_tiles(weight.detach())
    return tiles


def convolution_weight_gradient(gradient: Tensor, maps: Tensor, *, kernel: int, padding: int = 0) -> Tensor:
    """Take a convolution's gradient with respect to its weights, by a quarter of the products.

    The adjoint of :func:`convolution` with tiles: those of the maps and those of the gradient are
    transformed, multiplied number by number and added up, and the sums are transformed to kernels at the end.

    Parameters
    ----------
    gradient
        [B, O, H + 2 padding - k + 1, W + 2 padding - k + 1], of the loss with respect to the output; fastest
        with channels last in memory, as `maps`.
    maps
        [B, C, H, W], B >= 0, what was convolved; of the dtype and on the device of `gradient`.
    kernel
        k, rows and columns of a kernel.
    padding
        Rows and columns of zeros that were around every map, 0 to k - 1.

    Returns
    -------
    Tensor
        [O, C, k, k], channels last in memory where there are kernels for it; the same bit for bit for every
        number of threads.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype or device.

    Notes
    -----
    Errors are some units in 10**6 of the largest weight's gradient (``tests/ops/test_convolution.py``). NaN
    or infinity in a map or in the gradient makes weights of its channel not finite, of no other.

    Native on the CPU, where :func:`convolution_tiles` has tiles for such weights. Elsewhere, and where a
    gradient is asked for, it is PyTorch's.

    References
    ----------
    As of :func:`convolution`.

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import convolution_weight_gradient
    >>> maps, gradient = torch.ones(1, 16, 8, 8), torch.ones(1, 32, 6, 6)
    >>> convolution_weight_gradient(gradient, maps, kernel=3).shape
    torch.Size([32, 16, 3, 3])
    """
    check_convolution_weight_gradient(gradient, maps, kernel, padding)
    outputs, inputs = gradient.shape[1], maps.shape[1]
    wants_gradient = torch.is_grad_enabled() and (gradient.requires_grad or maps.requires_grad)
    if wants_gradient or not _worth_it(maps, inputs, outputs, (kernel, kernel)):
        shape = (outputs, inputs, kernel, kernel)
        pytorchs: Tensor = conv2d_weight(maps, shape, gradient, padding=padding)
        return pytorchs
    given = to_positions(gradient), to_positions(maps)
    result: Tensor = torch.ops.pydefect.convolution_weight_gradient(*given, kernel, padding)
    return result.permute(0, 3, 1, 2)


def _has_kernel(like: Tensor, sides: tuple[int, ...]) -> bool:
    return (
        like.device.type == "cpu"
        and _library.has_kernels(like.device)
        and like.dtype == torch.float32
        and sides in ((3, 3), (4, 4))
    )


def _worth_it(like: Tensor, inputs: int, outputs: int, sides: tuple[int, ...]) -> bool:
    wide = _WIDE_VECTORS and inputs >= _LEAST_INPUTS and outputs >= _LEAST_OUTPUTS
    return wide and _has_kernel(like, sides)


@torch.library.register_fake("pydefect::convolution")
def _convolution_fake(
    maps: Tensor,
    tiles: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    kernel: int,
    padding: int,
    relu: bool,
) -> Tensor:
    batch, height, width, _ = maps.shape
    grown = 2 * padding - kernel + 1
    return maps.new_empty((batch, height + grown, width + grown, bias.shape[0]))


@torch.library.register_fake("pydefect::convolution_tiles")
def _convolution_tiles_fake(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape[:2]
    return weight.new_empty((-(-outputs // 32), 36, -(-inputs // 16) * 16, 32))


@torch.library.register_fake("pydefect::convolution_weight_gradient")
def _convolution_weight_gradient_fake(gradient: Tensor, maps: Tensor, kernel: int, padding: int) -> Tensor:
    return maps.new_empty((gradient.shape[3], kernel, kernel, maps.shape[3]))
