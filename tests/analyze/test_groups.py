"""The groups of channels as data: what they hold, where they lie, and why some stay whole."""

import json

import pytest
import torch
from torch import nn

from multum import Task, capture
from multum.analyze import groups
from multum.errors import TaskError
from multum.graph.axes import axes
from multum.graph.surgery import cut
from multum.testing import ZOO


@pytest.fixture(scope="module")
def attention() -> dict:
    return {row["name"]: row for row in groups(*ZOO["fused_attention"]())["groups"]}


def test_members_name_tensor_dimension_size_and_layout(attention: dict) -> None:
    assert attention["qkv:out[1]"]["members"] == [
        {"tensor": "qkv.weight", "dim": 0, "size": 72, "layout": "3 x [4] x 6"},
        {"tensor": "qkv.bias", "dim": 0, "size": 72, "layout": "3 x [4] x 6"},
        {"tensor": "out.weight", "dim": 1, "size": 24, "layout": "[4] x 6"},
    ]
    assert {member["layout"] for member in attention["gate:out"]["members"]} == {"[32] + [32]", "[32]"}


def test_what_cannot_be_cut_has_a_reason(attention: dict) -> None:
    assert {name: row["reason"] for name, row in attention.items() if row["reason"]} == {
        "patches:out": "layer_norm normalizes over it",
        "qkv:out[0]": "its indices are taken one by one",
        "head:out": "it is an output of the model",
    }


def test_heads_name_their_width_as_a_factor(attention: dict) -> None:
    assert attention["qkv:out[1]"]["factors"] == ["qkv:out[0]", "qkv:out[2]"]
    assert attention["qkv:out[1]"]["kind"] == "heads"


@pytest.mark.parametrize("name", ["mixed", "fused_attention", "lstm", "unet_group_norm"])
def test_parameters_of_a_channel_are_those_that_go_with_it(name: str) -> None:
    graph = capture(*ZOO[name]())
    for row in groups(graph)["groups"]:
        if row["reason"] is None and row["size"] > 1:
            smaller = graph.copy()
            cut(smaller, {row["name"]: range(1, row["size"])})
            assert row["parameters"] == sum(p.numel() for p in graph.parameters()) - sum(p.numel() for p in smaller.parameters())


def test_it_is_json_and_the_kinds_are_explained() -> None:
    model, example = ZOO["mixed"]()
    found = groups(Task(model, example))
    assert json.loads(json.dumps(found)) == found
    assert set(found["kinds"]) == {row["kind"] for row in found["groups"]} == {"stream", "channels", "neurons"}
    assert [row["name"] for row in found["groups"]] == [group.name for group in axes(capture(model, example))]


def test_a_concatenation_inside_of_a_product_is_set_in_brackets() -> None:
    rows = {row["name"]: row for row in groups(*ZOO["mixed"]())["groups"]}
    assert [member["layout"] for member in rows["grouped:out[1]"]["members"]][-1] == "(4 x 4 + 4 x [8]) x 4 x 4"


def test_a_module_without_an_example_is_refused() -> None:
    with pytest.raises(TaskError, match="no example"):
        groups(nn.Linear(2, 2))
    assert groups(nn.Linear(2, 2), torch.zeros(2, 2))["groups"][0]["reason"] == "it is an output of the model"
