"""Factorized networks are pruned, trained, quantized, saved and exported like any other."""

import pytest
import torch
from torch import nn

import multum
from multum import Task, compress
from multum.distill import Logits
from multum.export import to_onnx_bytes, verify
from multum.factorize import CP, SVD, Quantized, Spatial, TensorTrain, Tucker
from multum.graph import layers
from multum.prune import Channels
from multum.quantize import Static

STEPS = [
    SVD(parameters=0.5, loss="outputs", weighting="outputs", samples=16),
    Spatial(parameters=0.6, samples=16),
    Tucker(parameters=0.6, samples=16),
    CP(parameters=0.6, samples=16, rounds=60),
    TensorTrain(parameters=0.6, samples=16),
    Quantized(bits=3, rank=2, samples=16),
]


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 5))
    x = torch.randn(32, 3, 8, 8)
    y = x[:, 0, 0, :5].argmax(1)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return Task(model.eval(), x[:2], train=batches, calibration=batches, validation=batches, loss=nn.functional.cross_entropy)


def whole(result: multum.step.Result, task: Task, folder) -> None:
    """The file gives the very outputs, the export agrees, and any batch runs."""
    multum.save(result, folder / "model.mip", task)
    x = task.train[0][0]
    given = result.graph(x)
    assert bool(torch.isfinite(given).all())
    torch.testing.assert_close(multum.load(folder / "model.mip")(x), given)
    verify(result.graph, to_onnx_bytes(result.graph))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name())
def test_channels_go_before_training_and_integers_come_after(task, step, tmp_path):
    result = compress(task, [Channels(ratio=0.25, samples=16), step, Logits(epochs=1.0), Static(samples=16)])
    factors = [layer for layer in layers(result.graph) if "factor" in layer.name]
    assert factors
    if not isinstance(step, Quantized):
        assert all(layer.quantizer() is not None for layer in factors)
    whole(result, task, tmp_path)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name())
def test_every_factor_trains(task, step):
    graph = compress(task, step).graph
    x, y = task.train[0]
    nn.functional.cross_entropy(graph(x), y).backward()
    gradients = [p.grad for name, p in graph.tensors.named_parameters() if "factor" in name]
    assert len(gradients) > 1
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize("step", STEPS[:-1], ids=lambda step: step.name())
def test_channels_of_the_chain_go_afterwards(task, step):
    result = compress(task, [step, Channels(ratio=0.25, samples=16)])
    assert result.records[1].parameters[1] < result.records[1].parameters[0]
    assert bool(torch.isfinite(result.graph(task.train[0][0])).all())
