"""Promise 2: every size is the size of a file, and the file is small."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import multum
from multum.prune import Weights
from multum.quantize import Half, Static, WeightOnly


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[multum.Task, int]:
    """A convolutional network of 1.2 million parameters, and the bytes of its fp32 file."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 256, 3, 2, 1), nn.ReLU(), nn.Conv2d(256, 384, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 10)).eval()
    assert sum(p.numel() for p in model.parameters()) > 1_000_000
    path = tmp_path_factory.mktemp("fp32") / "model.safetensors"
    save_file(model.state_dict(), path)
    data = [(torch.randn(8, 3, 32, 32), torch.zeros(8))]
    return multum.Task(model, torch.randn(2, 3, 32, 32), calibration=data), os.path.getsize(path)


@pytest.mark.parametrize(
    ("step", "most"),
    [
        (WeightOnly(), 0.27),
        (Static(), 0.27),
        (WeightOnly(bits=4), 0.15),
        (Static(weight_bits=4), 0.15),
        (Half(), 0.52),
        (Weights(probability=0.9), 0.15),
    ],
    ids=str,
)
def test_the_file_is_as_small_as_promised(large, step, most, tmp_path):
    task, fp32 = large
    size = multum.save(multum.compress(task, step), tmp_path / "model.mip", task)
    assert size == os.path.getsize(tmp_path / "model.mip")
    assert size <= most * fp32


def test_removed_channels_leave_the_file(large, tmp_path):
    task, fp32 = large
    multum.save(multum.compress(task, multum.prune.Channels(ratio=0.5)), tmp_path / "model.mip", task)
    assert os.path.getsize(tmp_path / "model.mip") <= 0.30 * fp32
