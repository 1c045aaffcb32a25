"""What is left after a cut computes what the whole computes when the cut channels are zero: on every model of the zoo."""

from typing import Any

import pytest
import torch
from torch import Tensor

from multum import Graph, capture
from multum.export import to_onnx_bytes, verify
from multum.graph import spec
from multum.graph.axes import axes
from multum.graph.file import dump, restore
from multum.graph.surgery import cut
from multum.task import call
from multum.testing import CONFIGS, ZOO

from .exact import double, lively, masked, shares

FAST = ("resnet", "shufflenet_v2", "yolo", "lstm", "fused_attention", "grouped_queries", "recurrent_cells")
MODELS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]
RATIOS = (0.25, 0.5, 0.75)


def network(name: str) -> tuple[Graph, Any]:
    if name in CONFIGS:
        pytest.importorskip("transformers")
    model, example = ZOO[name]()
    torch.manual_seed(0)
    return capture(lively(model), example), example


def wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return {key: wide(part) for key, part in value.items()} if isinstance(value, dict) else type(value)(wide(part) for part in value)


def many(value: Any) -> Any:
    """The batch three times over."""
    if isinstance(value, Tensor):
        return torch.cat([value] * 3)
    return {key: many(part) for key, part in value.items()} if isinstance(value, dict) else type(value)(many(part) for part in value)


@torch.no_grad()
def outputs(graph: Graph, example: Any) -> list[Tensor]:
    return spec.flatten(call(graph, example), graph.outputs)


def compare(found: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    for mine, other in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.double().abs().max()))


def train_one_step(graph: Graph, example: Any) -> None:
    graph.requires_grad_(True).train()
    sum(output.square().mean() for output in spec.flatten(call(graph, example), graph.outputs) if output.is_floating_point()).backward()
    gradients = [parameter.grad for parameter in graph.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    before = graph.fingerprint()
    torch.optim.SGD(graph.parameters(), 0.01).step()
    assert graph.fingerprint() != before
    graph.eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_the_cut_graph_equals_the_masked_one(name: str, tmp_path) -> None:
    original, example = network(name)
    wider = double(original.copy())
    left = [sum(p.numel() for p in original.parameters())]
    for ratio in RATIOS:
        keep = shares(axes(original), ratio, torch.Generator().manual_seed(0))
        assert keep
        for whole, inputs, tolerance in ((wider, wide(example), 1e-10), (original, example, 1e-5)):
            graph = whole.copy()
            cut(graph, keep)
            compare(outputs(graph, inputs), masked(whole, keep, inputs), tolerance)
        left.append(sum(p.numel() for p in graph.parameters()))
        sizes = {node.name: str(node.meta.get("val")) for node in graph.fx.nodes}
        graph.refresh()
        assert {node.name: str(node.meta.get("val")) for node in graph.fx.nodes} == sizes
        train_one_step(graph, example)
        dump(graph, tmp_path / "graph.safetensors")
        again = restore(tmp_path / "graph.safetensors")
        assert again.fingerprint() == graph.fingerprint()
        compare(outputs(again, many(example)), outputs(graph, many(example)), 1e-5)  # kernels round by where tensors lie in memory
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_cut_graph_is_exported_and_agrees(name: str) -> None:
    graph, _ = network(name)
    cut(graph, shares(axes(graph), 0.5, torch.Generator().manual_seed(0)))
    verify(graph, to_onnx_bytes(graph))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_cut_has_a_reason(name: str) -> None:
    """Every layer has outputs that can be cut, or a reason; and the groups of each kind say which layers they are in."""
    graph, _ = network(name)
    groups = axes(graph)
    for layer in groups.layers.values():
        for group in groups.outputs(layer.name):
            assert group.size > 1
            assert layer.name in group.producers
            assert group.reason is None or (len(group.reason) > 10 and "aten" not in group.reason)
