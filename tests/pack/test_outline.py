"""The description of a graph in a few words: every graph comes back, and what is forged is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import multum
from multum.errors import FileError
from multum.graph.file import to_data
from multum.pack import mip, model, outline
from multum.testing.zoo import ZOO


def data(name: str) -> tuple[dict, dict]:
    network, example = ZOO[name]()
    return to_data(multum.capture(network, example))


@pytest.mark.parametrize("name", ["resnet", "densenet", "lstm", "detector", "keyword_inputs", "tied_weights", "shufflenet"])
def test_every_graph_comes_back(name):
    graph, tensors = data(name)
    short, names = outline.shrink(graph, [], tensors)
    assert sorted(names) == sorted(tensors)
    back, halves = outline.expand(json.loads(json.dumps(short)), names)
    assert halves == []
    for kind in ("buffers", "integers", "sparse"):
        assert sorted(back.pop(kind)) == sorted(graph.pop(kind, []))
    assert back == json.loads(json.dumps(graph))
    assert len(json.dumps(short)) < 0.95 * len(json.dumps(graph))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.sampled_from(["~", "~1", "~~u", "", "mean"]),
    lambda inner: st.lists(inner, max_size=3) | st.fixed_dictionaries({"s": st.lists(inner, min_size=3, max_size=3)}),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_rows_come_back(draws):
    rows: list = [["in", "x", [1], "float32"]]
    node = st.integers(0, 10**6).map(lambda n: {"n": n})
    for length in range(1, draws.draw(st.integers(2, 12))):
        here = node.map(lambda value, length=length: {"n": value["n"] % length})
        match draws.draw(st.sampled_from(["get", "call", "call", "keywords"])):
            case "get":
                rows.append(["get", draws.draw(st.sampled_from(["a", "a.b", "c.d.e"]))])
            case kind:
                args = draws.draw(st.lists(VALUES | here | st.lists(here, max_size=3), max_size=4))
                row = ["call", draws.draw(st.sampled_from(["aten.relu.default", "add", "aten.add.Tensor"])), args]
                row.append(draws.draw(st.sampled_from(["", "a", "c.d"])))
                rows.append([*row, {"dim": draws.draw(VALUES | here)}] if kind == "keywords" else row)
    rows.append(["out", [{"n": len(rows) - 1}, {"n": 0}]])
    graph = {
        "graph": 1,
        "nodes": rows,
        "inputs": {},
        "outputs": {},
        "pinned": [1],
        "buffers": ["a"],
        "integers": ["c.d.e", "unread"],
        "sparse": ["a.b"],
    }
    short, names = outline.shrink(graph, ["a.b", "a"], ["a", "a.b", "c.d.e", "unread"])
    back, halves = outline.expand(json.loads(json.dumps(short)), names)
    assert back | {"integers": sorted(back["integers"])} == graph
    assert sorted(halves) == ["a", "a.b"]


def tiny() -> multum.Task:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 60),
        nn.ReLU(),
        nn.Linear(60, 10),
    )
    return multum.Task(network, torch.randn(2, 1, 28, 28))


def test_a_small_network_is_described_in_a_few_hundred_bytes(tmp_path):
    """Header, graph and meta data of a network of ten tensors and four quantizers."""
    task = tiny()
    size = multum.save(multum.compress(task, multum.quantize.WeightOnly(bits=2, edges=2)), tmp_path / "x.mip", task)
    assert size - sum(mip.sizes(tmp_path / "x.mip").values()) < 420


def forged(tmp_path, change) -> None:
    path = tmp_path / "x.mip"
    task = tiny()
    multum.save(task.original, path)
    meta, arrays = mip.read(path)
    change(meta["graph"])
    mip.write(tmp_path / "y.mip", meta, {name: arrays[name] for name in arrays})
    model.load(tmp_path / "y.mip")


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g["nodes"].insert(0, 99),
        lambda g: g["nodes"].insert(0, -1),
        lambda g: g["nodes"].insert(0, []),
        lambda g: g["nodes"].insert(0, "get"),
        lambda g: g["nodes"].insert(0, ["relu.", "~0"]),
        lambda g: g["nodes"].insert(0, ["relu.", "~1u"]),
        lambda g: g["nodes"].insert(2, ["relu.", "~9999u"]),
        lambda g: g["nodes"].insert(2, ["relu.", "~-1u"]),
        lambda g: g["nodes"].insert(2, ["relu.", "~"]),
        lambda g: g["nodes"].insert(2, ["relu.", {"n": 10**9}]),
        lambda g: g["nodes"].insert(2, ["os.system", "~0"]),
        lambda g: g["nodes"].insert(2, ["relu.", {"k": 3}]),
        lambda g: g["nodes"].insert(2, ["relu.", {"m": 3}]),
        lambda g: g.__setitem__("nodes", 5),
        lambda g: g.__setitem__("tensors", "0"),
        lambda g: g.__setitem__("tensors", 7),
        lambda g: g.__setitem__("tensors", "x" * len(g["tensors"])),
        lambda g: g.pop("pinned"),
    ],
)
def test_forged_descriptions_are_refused(tmp_path, change):
    with pytest.raises(FileError):
        forged(tmp_path, change)


def test_a_description_that_is_not_changed_is_accepted(tmp_path):
    """So what the forged ones are refused for is what they say."""
    forged(tmp_path, lambda graph: None)


def test_what_is_loaded_can_be_written_to(tmp_path):
    """Every tensor, also those of shared streams: the graph owns them."""
    task = tiny()
    multum.save(multum.compress(task, [multum.quantize.WeightOnly(bits=4), multum.quantize.Half()]), tmp_path / "x.mip", task)
    graph = model.load(tmp_path / "x.mip")
    for _, tensor in graph.named_tensors():
        with torch.no_grad():
            tensor.add_(1)
    assert np.isfinite(graph(torch.randn(2, 1, 28, 28)).detach().numpy()).all()


def test_zeros_that_are_meant_stay_so(tmp_path):
    graph = multum.compress(tiny(), [multum.prune.Weights(ratio=0.5), multum.quantize.WeightOnly(bits=4)]).graph
    assert graph.sparse
    multum.save(graph, tmp_path / "x.mip")
    assert model.load(tmp_path / "x.mip").sparse == graph.sparse
