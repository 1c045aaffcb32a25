"""The reference for a cut: the uncut graph, run with the channels that go set to zero in every tensor and every result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from multum.graph import Graph, spec
from multum.graph.axes import Groups, Keep, axes
from multum.graph.capture import arguments

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def masked(graph: Graph, keep: Keep, example: Any) -> list[Tensor]:
    """The outputs of a graph, flat, with all channels but those that `keep` names set to zero; inputs of the captured batch size."""
    with torch.no_grad():
        found: list[Tensor] = _Masked(graph, keep).run(*spec.flatten(arguments(example), graph.inputs))
    return list(found)


class _Masked(fx.Interpreter):
    def __init__(self, graph: Graph, keep: Keep):
        super().__init__(graph.tensors, graph=graph.fx)
        self.groups: Groups = axes(graph)
        self.keep = keep

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return self._zeroed(result, self.groups.results[n]) if n.op != "output" and n in self.groups.results else result

    def _zeroed(self, value: Any, dims: Any) -> Any:
        if not isinstance(value, Tensor):
            return tuple(self._zeroed(part, own) for part, own in zip(value, dims, strict=True))
        for dim, axis in enumerate(dims):
            if self.groups.size(axis, self.keep) != axis.size:
                shape = [-1 if other == dim else 1 for other in range(value.ndim)]
                mask = self.groups.mask(axis, self.keep).to(value.device).reshape(shape)
                value = torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))
        return value


def lively(model: nn.Module) -> nn.Module:
    """The model in eval mode with statistics, scales and shifts that no mistake can hide behind."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if value.is_floating_point():
                    value.data = torch.rand_like(value) + (0.5 if "var" in name or "weight" in name else -0.5)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def double(graph: Graph) -> Graph:
    """The graph in double precision, in place, and so what its author casts to single precision."""

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    for node in graph.fx.nodes:
        node.args, node.kwargs = map_aggregate(node.args, wide), map_aggregate(node.kwargs, wide)
    graph.recompile()
    graph.double()
    for node in graph.fx.nodes:
        if node.op == "placeholder" and node.meta["val"].is_floating_point():
            node.meta["val"] = node.meta["val"].double()
    graph.refresh()
    return graph


def shares(groups: Groups, ratio: float, generator: torch.Generator) -> dict[str, list[int]]:
    """Of each group that can be cut: channels to keep at random, as many as leaves `ratio` of them out, at least one."""
    keep = {}
    for group in groups:
        if not group.reason:
            left = max(1, round(group.size * (1 - ratio)))
            keep[group.name] = sorted(torch.randperm(group.size, generator=generator)[:left].tolist())
    return keep
