"""For each ATen operator that rearranges, joins, parts or makes tensors: how the axes of the result come from those of the inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from .axis import Axis, cut, fix, product, total, unify
from .axis_trace import Axes, Kept, Trace, assign, broadcast, fix_all, fixed, rule, shape, unknown
from .model import aten, read

_BATCH = "its size is computed"
_WHOLE = "only some of its indices are taken"
_SINGLE = "its indices are taken one by one"


@rule(aten.view.default, aten._unsafe_view, aten.reshape, aten.view_as, aten.reshape_as, aten.flatten)
@rule(aten.unsqueeze, aten.squeeze, aten.unflatten, aten.atleast_1d)
def _reshape(trace: Trace, node: fx.Node) -> Any:
    axes = tuple(Axis(size) for size in shape(node))
    unify(product(axes), product(trace.axes(node.args[0])))
    if node.target in (aten.view_as.default, aten.reshape_as.default):
        broadcast([axes, trace.axes(node.args[1])])
    names = {argument.name for argument in node.target._schema.arguments}  # type: ignore[union-attr]
    if name := next((name for name in ("size", "shape", "sizes") if name in names), None):
        start = read(node, "dim") % len(trace.axes(node.args[0])) if "dim" in names else 0
        _sizes(trace, node, name, axes[start : start + len(read(node, name))])
    return axes


def _sizes(trace: Trace, node: fx.Node, name: str, axes: Axes) -> None:
    """The sizes in a view. One that is computed from the batch size may hide a factor that is cut: it becomes -1 if it can."""
    given = read(node, name)
    computed = [place for place, size in enumerate(given) if isinstance(size, fx.Node)]
    inferred = -1 in given

    def value(kept: Kept) -> list[Any]:
        changed = [kept(axis) != axis.size for axis in axes]
        return [-1 if old == -1 or (isinstance(old, fx.Node) and new) else old if isinstance(old, fx.Node) else kept(axis)
                for old, axis, new in zip(given, axes, changed, strict=True)]  # fmt: skip

    for place in computed if inferred or len(computed) > 1 else ():
        fix(axes[place], "its size is computed")
    trace.literal(node, name, value)


@rule(aten.permute, aten.transpose.int, aten.t, aten.numpy_T, aten.mT, aten.adjoint)
@rule(aten.movedim, aten.moveaxis, aten.swapaxes, aten.swapdims)
def _permute(trace: Trace, node: fx.Node) -> Any:
    axes = trace.axes(node.args[0])
    marked = torch.empty(tuple(range(2, len(axes) + 2)), device="meta")  # each size names its dimension
    moved = node.target(marked, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(axes[size - 2] for size in moved.shape)


@rule(aten.expand, aten.expand_as, aten.broadcast_to)
def _expand(trace: Trace, node: fx.Node) -> Any:
    given, sizes = trace.axes(node.args[0]), shape(node)
    if node.target is aten.expand_as.default:
        return broadcast([given, trace.axes(node.args[1])])
    wanted = read(node, "size")
    padded = (*(Axis(1) for _ in range(len(sizes) - len(given))), *given)
    axes = tuple(
        axis if axis.size == size else Axis(size, None if isinstance(old, int) else _BATCH)
        for axis, size, old in zip(padded, sizes, wanted, strict=True)
    )
    trace.note("queries", (axis for axis, before in zip(axes, padded, strict=True) if axis is not before))
    trace.literal(node, "size", lambda kept: [kept(a) if isinstance(s, int) and s != -1 else s for s, a in zip(wanted, axes, strict=True)])
    return axes


@rule(aten.repeat)
def _repeat(trace: Trace, node: fx.Node) -> Any:
    given, times = trace.axes(node.args[0]), read(node, "repeats")
    padded = (*(Axis(1) for _ in range(len(times) - len(given))), *given)
    copies = [
        Axis(size // axis.size if axis.size else 1, None if isinstance(count, int) else _BATCH)
        for size, axis, count in zip(shape(node), padded, times, strict=True)
    ]
    trace.note("queries", copies)
    trace.literal(node, "repeats", lambda kept: [kept(a) if isinstance(t, int) else t for t, a in zip(times, copies, strict=True)])
    return tuple(product([copy, axis]) for copy, axis in zip(copies, padded, strict=True))


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(trace: Trace, node: fx.Node) -> Any:
    given, dim, times = trace.axes(node.args[0]), read(node, "dim"), read(node, "repeats")
    if dim is None or not isinstance(times, int):
        return unknown(trace, node)
    dim %= len(given)
    copies = Axis(times)
    trace.note("queries", [copies])
    trace.literal(node, "repeats", lambda kept: kept(copies))
    if read(node, "output_size") is not None:
        trace.literal(node, "output_size", lambda kept: kept(copies) * kept(given[dim]))
    return tuple(product([axis, copies]) if place == dim else axis for place, axis in enumerate(given))


# --- joining and parting -----------------------------------------------------------------------------------------------


@rule(aten.cat, aten.concat)
def _cat(trace: Trace, node: fx.Node) -> Any:
    operands = [axes for axes in map(trace.axes, read(node, "tensors")) if len(axes) == len(shape(node))]
    dim = read(node, "dim") % len(shape(node))
    joined = total([axes[dim] for axes in operands])
    rest = broadcast([(*axes[:dim], *axes[dim + 1 :]) for axes in operands])
    return (*rest[:dim], joined, *rest[dim:])


@rule(aten.stack)
def _stack(trace: Trace, node: fx.Node) -> Any:
    operands = [trace.axes(tensor) for tensor in read(node, "tensors")]
    dim = read(node, "dim") % len(shape(node))
    rest = broadcast(operands)
    return (*rest[:dim], Axis(len(operands), "it is stacked"), *rest[dim:])


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.unsafe_chunk, aten.tensor_split.sections)
def _split(trace: Trace, node: fx.Node) -> Any:
    given = trace.axes(node.args[0])
    dim = read(node, "dim") % len(given)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    pieces = cut(given[dim], list(accumulate(sizes))[:-1])

    def edit(kept: Kept) -> None:
        if kept(given[dim]) != given[dim].size:  # equal parts may become unequal
            node.target = aten.split_with_sizes.default
            node.args, node.kwargs = (node.args[0], [kept(piece) for piece in pieces], dim), {}

    trace.edits.append(edit)
    return tuple((*given[:dim], piece, *given[dim + 1 :]) for piece in pieces)


@rule(aten.slice.Tensor, aten.narrow.default)
def _slice(trace: Trace, node: fx.Node) -> Any:
    given, sizes = trace.axes(node.args[0]), shape(node)
    dim = read(node, "dim") % len(given)
    axis = given[dim]
    narrow = node.target is aten.narrow.default
    if sizes[dim] == axis.size and not narrow:
        return given
    start, step = read(node, "start") or 0, read(node, "step", 1)
    if step != 1 or not isinstance(start, int) or not sizes[dim]:
        fix(axis, _WHOLE)
        return (*given[:dim], Axis(sizes[dim], _WHOLE), *given[dim + 1 :])
    start = min(start + axis.size if start < 0 else start, axis.size)
    stop = start + sizes[dim]
    bounds = [bound for bound in (start, stop) if 0 < bound < axis.size]
    pieces = cut(axis, bounds)
    piece = pieces[1 if start else 0]

    def edit(kept: Kept) -> None:
        if kept(axis) != axis.size:
            first = kept(pieces[0]) if start else 0
            assign(node, "start", first)
            assign(node, "length" if narrow else "end", kept(piece) if narrow else first + kept(piece))

    trace.edits.append(edit)
    return (*given[:dim], piece, *given[dim + 1 :])


@rule(aten.select.int)
def _select(trace: Trace, node: fx.Node) -> Any:
    given = trace.axes(node.args[0])
    dim = read(node, "dim") % len(given)
    fix(given[dim], _SINGLE)
    return (*given[:dim], *given[dim + 1 :])


@rule(aten.unbind)
def _unbind(trace: Trace, node: fx.Node) -> Any:
    rest = _select(trace, node)
    return tuple(rest for _ in node.meta["val"])


@rule(aten.index_select)
def _index_select(trace: Trace, node: fx.Node) -> Any:
    given = trace.axes(node.args[0])
    dim = read(node, "dim") % len(given)
    fix(given[dim], _WHOLE)
    return (*given[:dim], *trace.argument(node, "index"), *given[dim + 1 :])


@rule(aten.gather)
def _gather(trace: Trace, node: fx.Node) -> Any:
    """An index for each result; in the other dimensions it may be shorter than what it indexes."""
    given, index = trace.axes(node.args[0]), trace.argument(node, "index")
    chosen = read(node, "dim") % len(given)
    for place, (axis, own) in enumerate(zip(given, index, strict=True)):
        if place != chosen and axis.size == own.size:
            unify(axis, own)
        else:
            fix_all((axis, own), _WHOLE)
    return index


@rule(aten.index.Tensor)
def _index(trace: Trace, node: fx.Node) -> Any:
    given, indices = trace.axes(node.args[0]), list(read(node, "indices"))
    chosen = [place for place, index in enumerate(indices) if index is not None]
    if any(len(trace.axes(indices[place])) == 0 or indices[place].meta["val"].dtype == torch.bool for place in chosen):
        return unknown(trace, node)
    fix_all((given[place] for place in chosen), _WHOLE)
    found = broadcast([trace.axes(indices[place]) for place in chosen])
    rest = [axis for place, axis in enumerate(given) if place not in chosen]
    adjacent = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    start = chosen[0] if adjacent else 0
    return (*rest[:start], *found, *rest[start:])


@rule(aten.glu)
def _glu(trace: Trace, node: fx.Node) -> Any:
    given = trace.axes(node.args[0])
    dim = read(node, "dim") % len(given)
    half, gate = cut(given[dim], [given[dim].size // 2])
    unify(half, gate)
    return (*given[:dim], half, *given[dim + 1 :])


@rule(aten.pad, aten.constant_pad_nd)
def _pad(trace: Trace, node: fx.Node) -> Any:
    given, widths = trace.axes(node.args[0]), list(read(node, "pad"))
    if not all(isinstance(width, int) for width in widths):
        return unknown(trace, node)
    constant = node.target is aten.constant_pad_nd.default or read(node, "mode") == "constant"
    sides = list(zip(widths[::2], widths[1::2], strict=True))  # the last dimension comes first
    axes, added = list(given), list[tuple[Axis, Axis]]()
    for dim, (before, after) in zip(range(len(given) - 1, -1, -1), sides, strict=False):
        pads = (Axis(max(before, 0)), Axis(max(after, 0)))
        if before or after:
            if not constant or min(before, after) < 0:
                fix(given[dim], "it is padded")
                axes[dim] = Axis(given[dim].size + before + after, "it is padded")
            else:
                axes[dim] = total([pads[0], given[dim], pads[1]])
        added.append(pads)
    if all(width >= 0 for width in widths):
        trace.literal(node, "pad", lambda kept: [kept(pad) if pad.size else 0 for pads in added for pad in pads])
    return tuple(axes)


# --- shuffling channels and pixels -------------------------------------------------------------------------------------


@rule(aten.pixel_shuffle)
def _pixel_shuffle(trace: Trace, node: fx.Node) -> Any:
    *batch, channels, rows, columns = trace.axes(node.args[0])
    factor = read(node, "upscale_factor")
    down, across = fixed((factor, factor), "it becomes pixels")
    outputs = Axis(channels.size // factor**2)
    unify(channels, product([outputs, down, across]))
    return (*batch, outputs, product([rows, down]), product([columns, across]))


@rule(aten.pixel_unshuffle)
def _pixel_unshuffle(trace: Trace, node: fx.Node) -> Any:
    *batch, channels, rows, columns = trace.axes(node.args[0])
    factor = read(node, "downscale_factor")
    fix_all((rows, columns), "it becomes channels")
    sizes = shape(node)[-2:]
    return (*batch, product([channels, *fixed((factor, factor), "it was pixels")]), *fixed(sizes, "it is an image"))


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def _channel_shuffle(trace: Trace, node: fx.Node) -> Any:
    x, group = trace.axes(node.args[0]), Axis(read(node, "groups"))
    inside = Axis(x[1].size // group.size)
    unify(x[1], product([group, inside]))
    trace.literal(node, "groups", lambda kept: kept(group))
    return (x[0], product([inside, group]), *x[2:])


@rule(aten.im2col)
def _unfold(trace: Trace, node: fx.Node) -> Any:
    *batch, channels, _, _ = x = trace.axes(node.args[0])
    fix_all(x[-2:], "a window slides over it")
    window = math.prod(read(node, "kernel_size"))
    return (*batch, product([channels, Axis(window, "it is a window")]), *fixed(shape(node)[-1:], "a window slides over it"))


# --- tensors from nothing ----------------------------------------------------------------------------------------------


@rule(aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
def _create(trace: Trace, node: fx.Node) -> Any:
    wanted: Sequence[Any] = read(node, "size")
    axes = tuple(Axis(size, None if isinstance(old, int) else _BATCH) for size, old in zip(shape(node), wanted, strict=True))
    trace.literal(node, "size", lambda kept: [kept(a) if isinstance(s, int) else s for s, a in zip(wanted, axes, strict=True)])
    return axes


@rule(aten.eye.default)
def _eye(trace: Trace, node: fx.Node) -> Any:
    axis = Axis(read(node, "n"))
    trace.literal(node, "n", lambda kept: kept(axis))
    return axis, axis


@rule(aten.arange, aten.linspace, aten.scalar_tensor)
def _count(trace: Trace, node: fx.Node) -> Any:
    return fixed(shape(node), "its indices are numbers")
