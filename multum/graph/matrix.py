"""Layers as products of matrices, whatever their stride, padding and groups: outputs = matrix @ columns."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ..errors import StepError
from .layers import KINDS, Layer
from .model import Graph, read, shape

_CONVOLUTIONS = tuple(target for target, (_, _, axis) in KINDS["conv"].items() if axis == 0)
_CHUNK = 1 << 26  # bytes of columns that are laid out at once
_DAMP = 1e-6  # of the mean of a gram's diagonal, added to it


def multiplies(layer: Layer) -> bool:
    """Whether the layer multiplies its matrix by columns; transposed convolutions, embeddings and recurrent layers do not."""
    return layer.node.target in _CONVOLUTIONS or layer.kind == "linear"


def to_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """A weight of at least two dimensions as [groups, outputs of a group, height of the columns]."""
    if layer.node.target in _CONVOLUTIONS:
        return weight.reshape(_groups(layer), -1, weight.shape[1:].numel())
    return weight.movedim(layer.axis, 0).flatten(1)[None]


def from_matrix(layer: Layer, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_matrix`, for a weight of this shape."""
    if layer.node.target in _CONVOLUTIONS:
        return matrix.reshape(shape)
    outputs, *rest = [shape[layer.axis], *(size for dim, size in enumerate(shape) if dim != layer.axis)]
    return matrix.reshape(outputs, *rest).movedim(0, layer.axis)


def columns(layer: Layer, value: Tensor, weight: torch.Size) -> Iterator[Tensor]:
    """What a layer with a weight of this shape multiplies its matrix by: [groups, height, n], some samples of `value` at a time."""
    yield from (found for found, _ in pairs(layer, value, None, weight))


def pairs(layer: Layer, value: Tensor, result: Tensor | None, weight: torch.Size) -> Iterator[tuple[Tensor, Tensor]]:
    """The columns with what they give in `result`, of the layer's shape: [groups, height, n] and [groups, outputs of a group, n]."""
    if layer.kind == "linear":
        flat = value.reshape(-1, value.shape[-1])
        given = flat if result is None else result.reshape(-1, result.shape[-1])
        size = max(1, _CHUNK // (flat.shape[1] * flat.element_size()))
        yield from ((part.T[None], own.T[None]) for part, own in zip(torch.split(flat, size), torch.split(given, size), strict=True))
        return
    groups, height = _groups(layer), weight[1:].numel()
    # the operator itself, with one filter for each element of its window, reads the windows
    unit = torch.eye(height, dtype=value.dtype, device=value.device).reshape(height, *weight[1:])
    unit = unit.repeat(groups, *[1] * (len(weight) - 1))
    size = max(1, _CHUNK // (groups * height * math.prod(shape(layer.node)[2:]) * value.element_size()))
    for part, own in zip(torch.split(value, size), torch.split(value if result is None else result, size), strict=True):
        whole = weight[2:].numel() == 1 and part.shape[2:] == shape(layer.node)[2:]  # each place is its own window
        windows: Tensor = part if whole else layer.node.target(part, unit, None, *layer.node.args[3:])  # type: ignore[operator]
        found = windows.transpose(0, 1).reshape(groups, height, -1)
        yield found, found if result is None else own.transpose(0, 1).reshape(groups, -1, found.shape[2])


def lower_factor(moments: Tensor) -> Tensor:
    """The lower triangular L with L L^T the second moments [..., n, n], in double precision.

    Those of inputs that are nearly the same can be indefinite by rounding, whatever their damping: they get more of it.
    Raises StepError when they are not finite.
    """
    if not moments.isfinite().all():
        do = "look at the calibration data, and lower the learning rate of what trained the network"
        raise StepError("The second moments of a layer's inputs are not finite.", "finite numbers", do)
    whole, eye = moments.double(), torch.eye(moments.shape[-1], dtype=torch.double, device=moments.device)
    ridge = 1e-4 * whole.diagonal(dim1=-2, dim2=-1).abs().mean(-1).clamp_min(1e-30)[..., None, None]
    lower, failed = torch.linalg.cholesky_ex(whole)
    while failed.any():
        whole, ridge = whole + ridge * eye, 10 * ridge
        lower, failed = torch.linalg.cholesky_ex(whole)
    result: Tensor = lower
    return result


def solved(gram: Tensor, pull: Tensor) -> Tensor:
    """The X of gram @ X = pull, of least squares, a little damped: features may depend on each other."""
    damp = _DAMP * gram.diagonal().mean().clamp_min(1e-30)
    found: Tensor = torch.linalg.solve(gram + damp * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), pull)
    return found


def refitted(matrix: Tensor, second: Tensor | None, features: Tensor) -> Tensor:
    """The best matrix [outputs, features] when features @ columns is what it reads, for a matrix @ columns with these second moments."""
    seen = features.T if second is None else second.double() @ features.T
    return solved(features @ seen, (matrix @ seen).T).T


def data(layer: Layer) -> fx.Node:
    """The operator that makes what the layer reads."""
    node = layer.node.args[1 if layer.position == 2 else 0]
    assert isinstance(node, fx.Node)
    return node


def positions(layer: Layer, results: bool = True) -> int:
    """How often the layer multiplies its matrix, in one sample; or how many positions it reads."""
    sizes = shape(layer.node if results else data(layer))
    return math.prod(sizes[2:] if layer.kind == "conv" else sizes[1:-1])


def geometry(layer: Layer) -> tuple[list[int], list[tuple[int, int]], list[int], list[int]]:
    """The window of a convolution, zeros before and after, stride and dilation, in each dimension."""
    weight = layer.node.args[layer.position]
    assert isinstance(weight, fx.Node)
    kernel = list(shape(weight)[2:])
    found = {name: read(layer.node, name) for name in ("stride", "dilation", "padding")}
    stride, dilation = (list(found[name]) * (len(kernel) // len(found[name])) for name in ("stride", "dilation"))
    spans = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    if found["padding"] == "same":
        return kernel, [(span // 2, span - span // 2) for span in spans], stride, dilation
    amounts = [0] if found["padding"] == "valid" else list(found["padding"])
    return kernel, [(amount, amount) for amount in amounts * (len(kernel) // len(amounts))], stride, dilation


def irreplaceable(graph: Graph, layer: Layer) -> str | None:
    """Why other layers cannot take the layer's place, where that does not depend on what they are."""
    weight = graph.tensor(layer.weight)
    if layer.quantizer() is not None or not weight.is_floating_point():
        return "its weight is quantized"
    if layer.weight in graph.sparse:
        return "its zeros would be filled"
    if layer.kind != "embedding" and not multiplies(layer):
        return "it is a transposed convolution"
    if read(layer.node, "groups", 1) != 1:
        return "it has groups"
    return None


def channel_dim(layer: Layer) -> int:
    """The dimension of what the layer reads in which its input channels lie."""
    return -1 if layer.kind == "linear" else 1


def _groups(layer: Layer) -> int:
    groups = read(layer.node, "groups", 1)
    assert isinstance(groups, int)
    return groups
