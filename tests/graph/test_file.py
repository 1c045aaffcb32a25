"""A graph as plain data: the same bits come back, and a hostile description is refused with a FileError."""

import copy
import json
import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from multum import capture
from multum.errors import FileError, GraphError
from multum.graph.file import allowed, dump, from_data, operators_to_json, restore, to_data
from multum.graph.model import aten
from multum.testing import ZOO


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    return capture(model, torch.randn(2, 1, 4, 4))


@pytest.fixture(scope="module")
def described():
    data, tensors = to_data(small())
    return json.loads(json.dumps(data)), tensors


def quantized(values, scale, zero=0, low=-2, high=1):
    """A linear layer without bias whose weight goes through a quantizer per output channel."""
    layer = nn.Linear(len(values[0]), len(values), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values))
    graph = capture(layer, torch.randn(2, len(values[0])))
    graph.set_tensor("scale", torch.tensor(scale))
    graph.set_tensor("zero", torch.full((len(values),), zero, dtype=torch.int32))
    (linear,) = graph.find(aten.linear.default)
    names = [graph.attribute(name, linear) for name in ("scale", "zero")]
    with graph.fx.inserting_before(linear):
        quantizer = graph.fx.call_function(aten.fake_quantize_per_channel_affine.default, (linear.args[1], *names, 0, low, high))
    linear.update_arg(1, quantizer)
    graph.recompile()
    graph.refresh()
    return graph


@pytest.mark.parametrize("name", ["resnet", "lstm", "keyword_inputs", "tied_weights", "shufflenet"])
def test_the_same_bits_come_back(name):
    model, example = ZOO[name]()
    graph = capture(model, example)
    data, tensors = to_data(graph)
    again = from_data(json.loads(json.dumps(data)), tensors)
    assert again.fingerprint() == graph.fingerprint()
    assert again.inputs == graph.inputs
    assert [name for name, _ in again.tensors.named_parameters()] == [name for name, _ in graph.tensors.named_parameters()]
    leaves = graph._example_leaves()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(graph._run(graph.tensors, *leaves), again._run(again.tensors, *leaves), strict=True))


def test_a_read_graph_knows_its_shapes_and_trains(described):
    graph = from_data(*described)
    shapes = {str(n.target): tuple(n.meta["val"].shape) for n in graph.fx.nodes if n.op == "call_function"}
    assert shapes["aten.conv2d.default"] == (2, 3, 2, 2)
    graph.train()(torch.randn(4, 1, 4, 4)).sum().backward()
    assert graph.tensor("0.weight").grad is not None


def test_what_always_trains_is_remembered():
    graph = capture(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)), torch.randn(4, 2))
    again = from_data(*to_data(graph))
    assert [node.args[5] for node in again.train().eval().find(aten.batch_norm.default)] == [True]


def test_quantized_weights_are_stored_as_integers():
    graph = quantized([[0.5, -1.0, 0.24], [0.1, 0.35, 9.0]], [0.5, 0.1])
    data, tensors = to_data(graph)
    assert data["integers"] == ["weight"]
    assert tensors["weight"].dtype is torch.int8
    assert tensors["weight"].tolist() == [[1, -2, 0], [1, 1, 1]]  # 0.35 / 0.1 is 3.5, 9.0 / 0.1 is 90: both are cut to 1
    again = from_data(data, tensors)
    torch.testing.assert_close(again.tensor("weight").detach(), torch.tensor([[0.5, -1.0, 0.0], [0.1, 0.1, 0.1]]))
    x = torch.randn(5, 3)
    assert torch.equal(again(x), graph(x))


GRIDS = {bits: quantized([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0], 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (2, 5, 8)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), st.floats(2**-10, 4, width=32), st.sampled_from(sorted(GRIDS)))
def test_loading_integers_computes_the_same_bits(values, scale, bits):
    graph = GRIDS[bits]
    graph.set_tensor("scale", torch.tensor([scale, scale * 1.7]))
    graph.set_tensor("weight", torch.tensor(values).reshape(2, 2))
    again = from_data(*to_data(graph))
    x = torch.tensor([[1.0, -0.3], [0.7, 2.0]])
    assert torch.equal(again(x), graph(x))
    assert to_data(again)[1]["weight"].tolist() == to_data(graph)[1]["weight"].tolist()


def test_integers_outside_their_grid_are_refused():
    data, tensors = to_data(quantized([[0.5, -1.0]], [0.5]))
    with pytest.raises(FileError, match=r"integers outside -2\.\.1"):
        from_data(data, tensors | {"weight": torch.tensor([[2, 0]], dtype=torch.int8)})


def test_integers_without_a_quantizer_are_refused(described):
    data, tensors = described
    with pytest.raises(FileError, match=r"'0\.weight' is said to hold integers"):
        from_data(data | {"integers": ["0.weight"]}, tensors)


def test_integers_that_nothing_reads_are_refused(described):
    data, tensors = copy.deepcopy(described)
    end = len(data["nodes"]) - 1
    data["nodes"].insert(end, ["get", "spare"])  # before the output, whose arguments lie before it
    with pytest.raises(FileError, match="'spare' is said to hold integers"):
        from_data(data | {"integers": ["spare"]}, tensors | {"spare": torch.ones(3)})


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "aten.from_file.default", "aten.add_.Tensor", "aten.resize_.default", "aten.set_.source_Storage",
        "aten.nonsense.default", "aten.add.nonsense", "aten.add", "prims.add.default", "quantized.linear.default", "aten.__class__.default",
        "aten.add.__init__",
        "eval", "builtins.eval", "", "aten..", "aten.add.Tensor.x", "aten.set_data.default", "aten.copy_.default",
    ],
)  # fmt: skip
def test_operators_that_are_not_pure_arithmetic_are_refused(name, described):
    with pytest.raises(FileError, match="asks for the operator"):
        allowed(name)
    data = copy.deepcopy(described[0])
    next(row for row in data["nodes"] if row[0] == "call")[1] = name
    with pytest.raises(FileError, match="do not trust this file"):
        from_data(data, described[1])


def changed(path, value):
    """An edit of a description; after "nodes" the kind of a row stands for the first row of that kind."""

    def edit(data):
        *way, last = path
        for key in way:
            data = data[next(i for i, row in enumerate(data) if row[0] == key) if key in ("in", "get", "call", "out") else key]
        if value is KeyError:
            del data[last]
        else:
            data[last] = value

    return edit


HOSTILE = {
    "version": changed(["graph"], 99),
    "no nodes": changed(["nodes"], KeyError),
    "nodes are a number": changed(["nodes"], 3),
    "a row is a number": changed(["nodes", 0], 3),
    "an unknown row": changed(["nodes", "in", 0], "exec"),
    "a name that is code": changed(["nodes", "in", 1], "x): import os  #"),
    "a name that is a keyword": changed(["nodes", "in", 1], "lambda"),
    "a negative size": changed(["nodes", "in", 2], [-1, 1, 4, 4]),
    "a huge size": changed(["nodes", "in", 2], [2**40, 1, 4, 4]),
    "sizes that overflow": changed(["nodes", "in", 2], [2**31, 2**31, 2**31, 2**31]),
    "a size that is a boolean": changed(["nodes", "in", 2], [True, 1, 4, 4]),
    "an unknown type": changed(["nodes", "in", 3], "object"),
    "a tensor that is a method": changed(["nodes", "get", 1], "forward"),
    "a tensor that is missing": changed(["nodes", "get", 1], "0.nothing"),
    "a forward reference": changed(["nodes", "call", 2, 0], {"n": 900}),
    "a negative reference": changed(["nodes", "call", 2, 0], {"n": -1}),
    "a reference that is text": changed(["nodes", "call", 2, 0], {"n": "0"}),
    "an unknown argument": changed(["nodes", "call", 2, 0], {"call": "os.system"}),
    "an argument of two kinds": changed(["nodes", "call", 2, 0], {"n": 0, "f": "inf"}),
    "too few arguments": changed(["nodes", "call", 2], []),
    "an argument of a wrong type": changed(["nodes", "call", 2, 0], "text"),
    "an output that is a size": lambda data: data["nodes"].__setitem__(-1, ["out", [{"d": {}}]]),
    "no outputs": changed(["nodes", -1], KeyError),
    "outputs that are numbers": changed(["nodes", "out", 1], [3]),
    "two ends": lambda data: data["nodes"].append(data["nodes"][-1]),
    "a structure that does not fit": changed(["outputs"], {"t": "tuple", "c": [{"t": "tensor"}, {"t": "tensor"}]}),
    "inputs of another structure": changed(["inputs"], {"t": "tensor"}),
    "an unknown structure": changed(["inputs", "t"], "object"),
    "buffers that are a number": changed(["buffers"], 7),
    "a pinned node that is missing": changed(["pinned"], [10**6]),
    "integers that are a number": changed(["integers"], 7),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_description_is_refused(name, described):
    data = copy.deepcopy(described[0])
    HOSTILE[name](data)
    with pytest.raises(FileError) as caught:
        from_data(data, described[1])
    assert caught.value.expected


@pytest.mark.parametrize("name", ["../x", "a b", "", "a..b", "__import__('os')"])
def test_tensors_with_names_that_are_no_names_are_refused(name, described):
    data, tensors = described
    with pytest.raises(FileError, match="damaged"):
        from_data(data, tensors | {name: torch.ones(1)})


def test_a_missing_tensor_is_refused(described):
    data, tensors = described
    with pytest.raises(FileError, match=r"0\.weight"):
        from_data(data, {name: value for name, value in tensors.items() if name != "0.weight"})


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["aten.add.Tensor", "aten.empty.memory_format", "aten.view.default", "aten.lstm.input", "getitem", "floordiv", "0.weight"]
    ),
    st.builds(lambda n: {"n": n}, st.integers(-1, 30)),
    st.lists(st.integers(-1, 10**9), max_size=4),
    st.just({"d": {}}),
    st.just({"s": [None, 2, None]}),
    st.just({"f": "nan"}),
    st.just({"dtype": "float64"}),
    st.just([]),
    st.just({}),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_any_damage_gives_a_graph_or_a_file_error(described, data):
    damaged = copy.deepcopy(described[0])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([path for path in places(damaged) if path]))
        junk = copy.deepcopy(data.draw(st.one_of(JUNK, st.just(KeyError))))  # later damage may go into this one
        changed(path, junk)(damaged)
    try:
        graph = from_data(damaged, described[1])
    except FileError:
        return
    assert graph.fingerprint()


def test_an_operator_that_no_file_may_hold_is_named():
    graph = small()
    node = graph.find(aten.relu.default)[0]
    node.target = aten.relu_.default
    with pytest.raises(GraphError, match=r"aten\.relu_\.default.*cannot be stored"):
        operators_to_json(graph)


def test_a_graph_at_work_is_kept_and_restored(tmp_path):
    graph = small()
    dump(graph, tmp_path / "graph.safetensors")
    assert restore(tmp_path / "graph.safetensors").fingerprint() == graph.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["graph.safetensors"]


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 64, None])
def test_a_damaged_kept_graph_is_refused(tmp_path, content):
    path = tmp_path / "graph.safetensors"
    if content is None:
        dump(small(), path)
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(FileError, match="cannot be read"):
        restore(path)


def test_shapes_that_do_not_fit_are_refused_without_a_trace(described):
    data, tensors = described
    logger, records = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        with pytest.raises(FileError, match="damaged"):
            from_data(data, tensors | {"4.weight": torch.ones(2, 5)})
    finally:
        logger.removeHandler(handler)
    assert not [record for record in records if record.levelno >= logging.ERROR]
    assert not logger.disabled
