"""Weights that are computed from tensors alone (weight norm, spectral norm, standardization) become tensors themselves."""

from __future__ import annotations

import torch
from torch import fx

from .layers import KINDS, source
from .model import Graph, aten, read

_LAYERS = (aten.linear.default, *KINDS["conv"])


def fold(graph: Graph) -> list[str]:
    """Computes such weights once, in place, as they are in eval mode; gives the names of the new parameters.

    Afterwards they are weights of layers like any other: counted, cut, quantized and trained. What is random, and what
    shares a parameter with other operators, stays computed.
    """
    made: dict[frozenset[str], str] = {}
    for node, steps in _computed(graph):
        tensors = frozenset(str(step.target) for step in steps if step.op == "get_attr")
        value = _value(graph, steps)
        if tensors not in made or not torch.equal(graph.tensor(made[tensors]), value):  # it is where a module is called twice
            name = f"{node.meta.get('module') or node.name}.weight"
            made[tensors] = name if name not in dict(graph.named_tensors()) else f"{name}_"
            graph.set_tensor(made[tensors], value, parameter=True)
        node.replace_input_with(steps[-1], graph.attribute(made[tensors], node))
    if made:
        graph.clean()
    return list(made.values())


def _computed(graph: Graph) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Layers whose weight is computed from parameters that nothing else reads, each with what computes it."""
    parameters = {name for name, _ in graph.tensors.named_parameters()}
    found = []
    for node in graph.find(*_LAYERS):
        weight = read(node, "weight")
        steps = _steps(graph, weight) if isinstance(weight, fx.Node) and source(weight) is None else []
        if any(step.target in parameters for step in steps if step.op == "get_attr"):
            found.append((node, steps))
    users = {node for node, _ in found} | {step for _, steps in found for step in steps}
    shared = {node.target for node in graph.fx.nodes if node.op == "get_attr" and not users.issuperset(node.users)} & parameters
    return [(node, steps) for node, steps in found if not any(step.op == "get_attr" and step.target in shared for step in steps)]


def _steps(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """What a result is computed from, in order; nothing when that is inputs of the model, other layers or chance."""
    found, ahead = {node}, [node]
    while ahead:
        for given in ahead.pop().all_input_nodes:
            random = torch.Tag.nondeterministic_seeded in getattr(given.target, "tags", ())
            if given.op == "placeholder" or given.target in _LAYERS or random:
                return []
            if given not in found:
                found.add(given)
                ahead.append(given)
    return [step for step in graph.fx.nodes if step in found]


@torch.no_grad()
def _value(graph: Graph, steps: list[fx.Node]) -> torch.Tensor:
    values: dict[fx.Node, torch.Tensor] = {}
    for step in steps:
        if step.op == "get_attr":
            values[step] = graph.tensor(str(step.target)).detach()
        else:
            args, kwargs = fx.map_arg((step.args, step.kwargs), values.__getitem__)
            values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
    return values[steps[-1]].clone()
