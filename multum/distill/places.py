"""Which hidden values of a student answer to which of its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, fx

from ..errors import StepError, near
from ..graph import Graph, layers
from ..graph.layers import KINDS
from ..graph.model import aten
from ..graph.residual import blocks

_ACTIVATIONS = (aten.relu.default, aten.relu_.default, aten.gelu.default, aten.silu.default, aten.hardswish.default, aten.tanh.default)
_MOST = 4  # pairs, when none are named

Pair = tuple[fx.Node, fx.Node]


def pairs(student: Graph, teacher: Graph, named: Sequence[str] = ()) -> list[Pair]:
    """Operators of both graphs whose results mean the same, in order of execution.

    `named` are glob patterns of layers of the student, or "student layer=teacher layer". Otherwise they are the ends of residual blocks,
    else activations, else layers: those of the same name where the student is the teacher made smaller, else those as deep; four at most,
    evenly spread, the deepest among them. Values with other numbers of positions do not pair. Raises StepError when nothing pairs.
    """
    if named:
        found = [pair for pattern in named for pair in _named(student, teacher, pattern)]
    else:
        ours, theirs = (points(graph) for graph in (student, teacher))
        names = {node.name: node for node in theirs}
        found = [(node, names[node.name]) for node in ours if node.name in names]
        if not found or found[-1] != (ours[-1], theirs[-1]):  # names that agree by chance: another network, of other depth
            found = [(node, theirs[round((place + 1) * len(theirs) / len(ours)) - 1]) for place, node in enumerate(ours)]
    found = [pair for pair in found if _places(pair[0]) == _places(pair[1])]
    if not found:
        told = "No hidden value of the student has as many positions as one of the teacher."
        raise StepError(told, "layers that see the same positions", "name pairs of layers: layers=('student.layer=teacher.layer',)")
    if named or len(found) <= _MOST:
        return found
    return [found[round((place + 1) * len(found) / _MOST) - 1] for place in range(_MOST)]


def points(graph: Graph) -> list[fx.Node]:
    """What is worth imitating: the ends of blocks, else activations, else layers; never an output of the model."""
    last = set(graph.fx.output_node().all_input_nodes)
    kinds = (
        [block.total for block in blocks(graph)],
        graph.find(*_ACTIVATIONS),
        [layer.node for layer in layers(graph) if layer.kind in ("conv", "linear")],
    )
    order = {node: place for place, node in enumerate(graph.fx.nodes)}
    for nodes in kinds:
        found = sorted({node for node in nodes if node not in last and _places(node) is not None}, key=order.__getitem__)
        if found:
            return found
    return []


def _named(student: Graph, teacher: Graph, pattern: str) -> list[Pair]:
    ours, _, theirs = pattern.partition("=")
    known = {layer.name: layer.node for layer in layers(teacher)}
    found = []
    for layer in layers(student):
        if fnmatchcase(layer.name, ours):
            if (theirs or layer.name) not in known:
                raise StepError(f"The teacher has no layer {theirs or layer.name!r}.", f"such as {near(theirs or layer.name, known)}")
            found.append((layer.node, known[theirs or layer.name]))
    if not found:
        raise StepError(f"The pattern {ours!r} matches no layer.", f"such as {near(ours, [layer.name for layer in layers(student)])}")
    return found


def _places(node: fx.Node) -> tuple[int, ...] | None:
    """The sizes of a value but for its channels; None for what has no channels."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        return None
    return (value.shape[0], *value.shape[2:]) if value.ndim >= 4 or is_signal(node) else tuple(value.shape[:-1])


def is_signal(node: fx.Node) -> bool:
    """Whether a value is [n, channels, time], as convolutions make it, and not [n, positions, channels]."""
    value = node.meta.get("val")
    while isinstance(value, Tensor) and value.ndim == 3 and node.all_input_nodes:
        if node.target in (*KINDS["conv"], aten.batch_norm.default):
            return True
        if node.target in (*KINDS["linear"], *KINDS["embedding"], aten.layer_norm.default, aten.transpose.int, aten.permute.default):
            return False
        node = node.all_input_nodes[0]
        value = node.meta.get("val")
    return False
