"""Axes: the dimensions of tensors, as atoms that are the same channel wherever they appear, and as sums and products of them.

A concatenation lies in a dimension as a sum of axes, in order. A view that merges dimensions makes a row-major product.
`unify` says that two axes are one: it binds atoms, and splits them where sums and products must be cut at the same places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

_SPLIT = "its parts do not line up where it is cut or reshaped"


class Axis:
    """A dimension of `size` indices: an atom (`reason` says why it must stay whole), a sum or a product of axes, or bound to another."""

    __slots__ = ("bound", "factors", "parts", "reason", "size")

    def __init__(self, size: int, reason: str | None = None):
        self.size = size
        self.reason = reason
        self.bound: Axis | None = None
        self.parts: tuple[Axis, ...] = ()
        self.factors: tuple[Axis, ...] = ()

    def __repr__(self) -> str:
        axis = find(self)
        if axis.parts:
            return f"({' + '.join(map(repr, axis.parts))})"
        if axis.factors:
            return f"({' x '.join(map(repr, axis.factors))})"
        return f"{axis.size}{'!' if axis.reason else ''}"


def find(axis: Axis) -> Axis:
    """The axis that this one is bound to in the end."""
    root = axis
    while root.bound is not None:
        root = root.bound
    while axis.bound is not None:
        axis.bound, axis = root, axis.bound
    return root


def total(parts: Sequence[Axis]) -> Axis:
    """The axis in which `parts` lie one after the other."""
    flat = [piece for part in parts for piece in find(part).parts or (part,) if piece.size]
    if len(flat) == 1:
        return flat[0]
    axis = Axis(sum(part.size for part in flat))
    axis.parts = tuple(flat)
    return axis


def product(factors: Sequence[Axis]) -> Axis:
    """The axis that a row-major merge of dimensions makes; the last factor runs fastest."""
    flat = [piece for factor in factors for piece in _factors(factor) if piece.size != 1]
    if len(flat) == 1:
        return flat[0]
    axis = Axis(math.prod(factor.size for factor in flat))
    axis.factors = tuple(flat)
    return axis


def atoms(axis: Axis) -> Iterator[Axis]:
    """The atoms of an axis from left to right, each as often as it appears."""
    axis = find(axis)
    if axis.parts or axis.factors:
        for piece in axis.parts or axis.factors:
            yield from atoms(piece)
    else:
        yield axis


def fix(axis: Axis, reason: str) -> None:
    """Every atom of the axis must stay whole; the first reason given is kept."""
    for atom in atoms(axis):
        atom.reason = atom.reason or reason


def unify(a: Axis, b: Axis) -> None:
    """The two axes are one from now on. Where their parts cannot be lined up both are fixed."""
    a, b = find(a), find(b)
    if a is b or a.size == b.size == 1:
        return
    if a.size != b.size:
        _fail(a, b)
    elif _is_atom(a):
        _bind(a, b)
    elif _is_atom(b):
        _bind(b, a)
    else:
        (_unify_sums if a.parts or b.parts else _unify_products)(a, b)
        a.bound = b


def cut(axis: Axis, bounds: Sequence[int]) -> list[Axis]:
    """The pieces of an axis between `bounds`, increasing positions strictly inside it."""
    axis = find(axis)
    if not bounds:
        return [axis]
    if axis.parts:
        return _cut_sum(axis, bounds)
    if axis.factors:
        lead, *rest = _factors(axis)
        step = axis.size // lead.size
        if all(bound % step == 0 for bound in bounds):
            return [product([piece, *rest]) for piece in cut(lead, [bound // step for bound in bounds])]
        fix(axis, _SPLIT)
    ends = [0, *bounds, axis.size]
    pieces = [Axis(end - start, _SPLIT if axis.factors else axis.reason) for start, end in pairwise(ends)]
    if not axis.factors:
        axis.parts = tuple(pieces)
    return pieces


def kept(axis: Axis, keep: Callable[[Axis], Sequence[int] | None]) -> int:
    """How many indices of the axis are left, when `keep` gives those of each atom (None: all)."""
    axis = find(axis)
    if axis.parts:
        return sum(kept(part, keep) for part in axis.parts)
    if axis.factors:
        return math.prod(kept(factor, keep) for factor in axis.factors)
    indices = keep(axis)
    return axis.size if indices is None else len(indices)


def mask(axis: Axis, keep: Callable[[Axis], Sequence[int] | None]) -> Tensor:
    """True where an index of the axis is left [size]."""
    axis = find(axis)
    if axis.parts:
        return torch.cat([mask(part, keep) for part in axis.parts])
    if axis.factors:
        result = torch.ones(1, dtype=torch.bool)
        for factor in axis.factors:
            result = (result[:, None] & mask(factor, keep)).flatten()
        return result
    indices = keep(axis)
    result = torch.full((axis.size,), indices is None)
    if indices is not None:
        result[list(indices)] = True
    return result


def places(axis: Axis, atom: Axis) -> Tensor:
    """For each index of the axis, the index of `atom` that it belongs to; -1 where it belongs to none [size]."""
    axis = find(axis)
    if axis is atom:
        return torch.arange(axis.size)
    if axis.parts:
        return torch.cat([places(part, atom) for part in axis.parts])
    result = torch.full((1,), -1)
    for factor in axis.factors:
        inner = places(factor, atom)
        result = torch.where(result[:, None] < 0, inner, result[:, None]).flatten()
    return result if axis.factors else torch.full((axis.size,), -1)


def _is_atom(axis: Axis) -> bool:
    return not (axis.parts or axis.factors)


def _factors(axis: Axis) -> list[Axis]:
    axis = find(axis)
    return [piece for factor in axis.factors for piece in _factors(factor)] if axis.factors else [axis]


def _parts(axis: Axis) -> list[Axis]:
    axis = find(axis)
    return [piece for part in axis.parts for piece in _parts(part)] if axis.parts else [axis]


def _bind(atom: Axis, to: Axis) -> None:
    if atom.reason:
        fix(to, atom.reason)
    atom.bound = to


def _fail(a: Axis, b: Axis) -> None:
    fix(a, _SPLIT)
    fix(b, _SPLIT)


def _bounds(parts: Sequence[Axis]) -> set[int]:
    return set(accumulate(part.size for part in parts[:-1]))


def _unify_sums(a: Axis, b: Axis) -> None:
    """At least one is a sum: both are cut wherever either has a boundary."""
    bounds = sorted(_bounds(_parts(a)) | _bounds(_parts(b)))
    for left, right in zip(cut(a, bounds), cut(b, bounds), strict=True):
        unify(left, right)


def _unify_products(a: Axis, b: Axis) -> None:
    """Both are products: the larger of the two leading factors is split by the smaller one, again and again."""
    left, right = _factors(a), _factors(b)
    while left and right:
        p, q = left.pop(0), right.pop(0)
        if p.size == q.size:
            unify(p, q)
            continue
        larger, smaller, rest = (p, q, left) if p.size > q.size else (q, p, right)
        if larger.size % smaller.size:
            for axis in (p, q, *left, *right):
                fix(axis, _SPLIT)
            return
        remainder = Axis(larger.size // smaller.size)
        unify(larger, product([smaller, remainder]))
        rest.insert(0, remainder)


def _cut_sum(axis: Axis, bounds: Sequence[int]) -> list[Axis]:
    pieces: list[Axis] = []
    start = 0
    for part in _parts(axis):
        pieces += cut(part, [bound - start for bound in bounds if start < bound < start + part.size])
        start += part.size
    grouped: list[list[Axis]] = [[]]
    position = 0
    for piece in pieces:
        if position in bounds:
            grouped.append([])
        grouped[-1].append(piece)
        position += piece.size
    return [total(group) for group in grouped]
