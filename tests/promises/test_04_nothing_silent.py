"""Promise 4: every layer is changed or skipped with a reason; what changes nothing is an error."""

import pytest
import torch
from torch import nn

import multum
from multum.errors import StepError
from multum.graph import layers
from multum.prune import Channels
from multum.quantize import Static, WeightOnly


@pytest.mark.parametrize("step", [Static(), WeightOnly(bits=4), WeightOnly(exclude="4")], ids=str)
def test_every_layer_is_accounted_for(task, step):
    (record,) = multum.compress(task, step).records
    weighty = {layer.name for layer in layers(task.original) if layer.kind != "norm"}
    assert weighty <= set(record.changes) | set(record.skipped)
    assert all(record.skipped.values())


def test_channels_name_the_reason_of_every_layer_left_whole(task):
    (record,) = multum.compress(task, Channels(ratio=0.5)).records
    assert record.changes
    assert "output" in record.skipped["4"], "the classifier's outputs are the network's"


@pytest.mark.parametrize("step", [Static(include="3.conv9"), WeightOnly(exclude="conv*"), Channels(include="nothing.*")], ids=str)
def test_a_pattern_that_matches_nothing_names_the_near_misses(task, step):
    with pytest.raises(StepError, match=r"matches no layer.*\n.*such as '"):
        multum.compress(task, step)


def test_a_step_that_would_change_nothing_is_an_error():
    class Sum(nn.Module):
        def forward(self, x):
            return x + 1

    with pytest.raises(StepError, match="would change nothing"):
        multum.compress(multum.Task(Sum(), torch.zeros(2, 3)), WeightOnly())
