"""Groups of channels: which indices of which dimensions of which tensors go together, and why some cannot be cut."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor, fx

from ..errors import GraphError, near
from . import axis_views as _axis_views  # noqa: F401  (registers its rules)
from .axis import Axis, atoms, find, fix, kept, mask, places
from .axis_kinds import kinds
from .axis_rules import pointwise
from .axis_trace import RULES, Axes, Edit, Trace, fix_all, fixed, is_pointwise, unknown
from .layers import Layer, layers
from .model import Graph, aten

Keep = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are cut together: index i of it is the same channel in every member.

    `members` are tensors with the dimension in which the group lies; `producers` are the layers whose outputs it is,
    `consumers` those that read it. `reason` says why it cannot be cut; None when it can. `kind` says what one channel is: a key of `KINDS`.
    """

    name: str
    kind: str
    size: int
    reason: str | None
    members: tuple[tuple[str, int], ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    axis: Axis

    @property
    def block(self) -> str:
        """The innermost module of the user's that has all layers of the group, such as `encoder.layer.0.attention`."""
        paths = [name.split(".")[:-1] for name in (*self.producers, *self.consumers)]
        return ".".join(path[0] for path in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


class Groups:
    """The groups of a graph, by name in order of execution: all that can be cut, and all that a layer makes."""

    def __init__(self, graph: Graph, trace: Trace, found: Sequence[Layer]):
        self.tensors: dict[str, Axes] = trace.tensors
        self.results: dict[fx.Node, Axes] = trace.results
        self.edits: list[Edit] = trace.edits
        self.layers = {layer.name: layer for layer in found}
        self._groups = {group.name: group for group in _groups(graph, trace, found)}
        self._named = {group.axis: group for group in self._groups.values()}

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def __getitem__(self, name: str) -> Group:
        if name not in self._groups:
            raise GraphError(f"The graph has no group of channels {name!r}.", f"one of its groups, such as {near(name, self._groups)}")
        return self._groups[name]

    def __len__(self) -> int:
        return len(self._groups)

    def within(self, tensor: str, dim: int) -> list[Group]:
        """The groups that make up a dimension of a tensor, from left to right."""
        return self.inside(self.tensors[tensor][dim])

    def inside(self, axis: Axis) -> list[Group]:
        """The groups that make up an axis, from left to right."""
        return [self._named[atom] for atom in dict.fromkeys(atoms(axis)) if atom in self._named]

    def outputs(self, layer: str) -> list[Group]:
        """The groups that make up the outputs of a layer."""
        return self.within(self.layers[layer].weight, self.layers[layer].axis)

    def factors(self, group: Group) -> list[Group]:
        """The groups that share a dimension with this one as factors of a product, such as heads and their width."""
        found: dict[Group, None] = {}
        for tensor, dim in group.members:
            for product_ in _products(self.tensors[tensor][dim]):
                inside = list(dict.fromkeys(atoms(product_)))
                if group.axis in inside:
                    found |= {self._named[atom]: None for atom in inside if atom in self._named and atom is not group.axis}
        return list(found)

    def cofactor(self, group: Group) -> int:
        """How many indices of a dimension one channel of the group stands for, at least."""
        found = []
        for tensor, dim in group.members:
            inside = [product_ for product_ in _products(self.tensors[tensor][dim]) if group.axis in atoms(product_)]
            found.append(min((product_.size // group.size for product_ in inside), default=1))
        return min(found, default=1)

    def size(self, axis: Axis, keep: Keep) -> int:
        """How many indices of an axis are left."""
        return kept(axis, lambda atom: self._indices(atom, keep))

    def mask(self, axis: Axis, keep: Keep) -> Tensor:
        """True where an index of an axis is left [size]; `tensors` and `results` hold the axes."""
        return mask(axis, lambda atom: self._indices(atom, keep))

    def places(self, tensor: str, dim: int, group: Group) -> Tensor:
        """For each index of a tensor's dimension, the channel of `group` that it belongs to; -1 for none [size]."""
        return places(self.tensors[tensor][dim], group.axis)

    def _indices(self, atom: Axis, keep: Keep) -> Sequence[int] | None:
        group = self._named.get(atom)
        return keep.get(group.name) if group else None


def axes(graph: Graph) -> Groups:
    """The groups of channels of a graph, found by the rule of each operator."""
    trace = Trace()
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            trace.results[node] = fixed(node.meta["val"].shape, "it is an input of the model")
        elif node.op == "get_attr":
            name = str(node.target)
            if name not in trace.tensors:
                trace.tensors[name] = tuple(Axis(size) for size in graph.tensor(name).shape)
            trace.results[node] = trace.tensors[name]
        elif node.op == "call_function":
            _call(trace, node)
        else:
            for result in node.all_input_nodes:
                fix_all(trace.axes(result), "it is an output of the model")
    return Groups(graph, trace, layers(graph))


def _call(trace: Trace, node: fx.Node) -> None:
    value = node.meta.get("val")
    if node.target is operator.getitem:
        trace.results[node] = trace.results[node.args[0]][node.args[1]]  # type: ignore[index]
    elif node.target is aten.sym_size.int:
        fix(trace.axes(node.args[0])[node.args[1]], "its size is used as a number")  # type: ignore[index]
    elif isinstance(value, Tensor | tuple):
        target = node.target
        rule = RULES.get(target) or RULES.get(getattr(target, "overloadpacket", None)) or (pointwise if is_pointwise(target) else unknown)
        result = rule(trace, node)
        trace.results[node] = result if _fits(result, value) else unknown(trace, node)
    else:
        for given in node.all_input_nodes:
            fix_all(trace.axes(given), "its size is used as a number")


def _fits(result: object, value: object) -> bool:
    """Whether the axes that a rule gave have the sizes of the operator's result."""
    if isinstance(value, Tensor):
        return isinstance(result, tuple) and [getattr(axis, "size", None) for axis in result] == list(value.shape)
    return isinstance(result, tuple) and isinstance(value, tuple) and len(result) == len(value) and all(map(_fits, result, value))


def _products(axis: Axis) -> list[Axis]:
    axis = find(axis)
    if axis.factors:
        return [axis]
    return [found for part in axis.parts for found in _products(part)]


def _groups(graph: Graph, trace: Trace, found: Sequence[Layer]) -> list[Group]:
    """One group for each atom that is longer than one; the layer that makes it, or else a tensor that has it, names it."""
    tensors = trace.tensors
    names: dict[Axis, str] = {}
    producers: dict[Axis, dict[str, None]] = {}
    consumers: dict[Axis, dict[str, None]] = {}
    for layer in found:
        for dim, axis in enumerate(tensors[layer.weight]):
            inside = [atom for atom in dict.fromkeys(atoms(axis)) if atom.size > 1]
            for atom in inside:
                (producers if dim == layer.axis else consumers).setdefault(atom, {})[layer.name] = None
            if dim == layer.axis:
                _name(names, inside, f"{layer.name}:out")
    members: dict[Axis, list[tuple[str, int]]] = {}
    for tensor, dims in tensors.items():
        for dim, axis in enumerate(dims):
            inside = [atom for atom in dict.fromkeys(atoms(axis)) if atom.size > 1]
            for atom in inside:
                members.setdefault(atom, []).append((tensor, dim))
            _name(names, inside, f"{tensor}:{dim}")
    kind, parameters = kinds(graph, trace, found), {name for name, _ in graph.tensors.named_parameters()}
    groups = []
    for atom, name in names.items():
        made, read = tuple(producers.get(atom, ())), tuple(consumers.get(atom, ()))
        if made or (atom.reason is None and (read or any(tensor in parameters for tensor, _ in members[atom]))):
            groups.append(Group(name, kind(atom, made, read), atom.size, atom.reason, tuple(members[atom]), made, read, atom))
    return groups


def _name(names: dict[Axis, str], inside: Sequence[Axis], name: str) -> None:
    """Names the atoms of a dimension that have no name yet; the place tells several apart."""
    for place, atom in enumerate(inside):
        names.setdefault(atom, name if len(inside) == 1 else f"{name}[{place}]")
