"""Integer weights and activations: where quantizers stand, what they cost, and that the file holds the very bits."""

import json
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from multum.errors import StepError, TaskError
from multum.export import to_onnx_bytes
from multum.graph import Graph, capture, layers
from multum.graph.file import from_data, to_data
from multum.graph.model import aten, read
from multum.quantize import Static, WeightOnly
from multum.quantize.placement import place
from multum.step import Recipe, compress
from multum.task import Task
from multum.testing import Trial

FASHION = Path(__file__).parents[2] / "examples" / "fashion_mnist"
WEIGHT = aten._fake_quantize_learnable_per_channel_affine.default
ACTIVATION = aten.fake_quantize_per_tensor_affine.tensor_qparams


@pytest.fixture(scope="module")
def resnet() -> Task:
    """The trained ResNet-20 of the example, on blurred noise, with its own answers as labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FASHION))
        from model import ResNet20

    model = ResNet20().eval()
    model.load_state_dict(load_file(FASHION / "resnet20.safetensors"))
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.randn(6, 16, 1, 7, 7).flatten(0, 1), 28, mode="bilinear").reshape(6, 16, 1, 28, 28)
    batches = [(x, torch.zeros(16)) for x in images]
    return Task(model, images[0][:2], calibration=batches[:4], validation=batches[4:])


@pytest.fixture(scope="module")
def quantized(resnet: Task) -> Graph:
    return compress(resnet, Static()).graph


def relative(graph: Graph, task: Task) -> float:
    x = torch.cat([x for x, _ in task.data("validation")])
    with torch.no_grad():
        expected = task.original(x)
        return float((graph(x) - expected).norm() / expected.norm())


def small(*modules: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> Task:
    torch.manual_seed(0)
    batches = [(torch.randn(4, *shape), torch.zeros(4)) for _ in range(3)]
    return Task(nn.Sequential(*modules), batches[0][0], calibration=batches, validation=batches)


def behind(node: fx.Node) -> set[str]:
    return {str(user.target) for user in node.users}


# --- the network as a whole ------------------------------------------------------------------------------------------


def test_the_resnet_stays_close(resnet: Task, quantized: Graph) -> None:
    assert relative(quantized, resnet) < 0.06


def test_every_value_between_layers_is_on_a_grid(quantized: Graph) -> None:
    integer = [aten.conv2d.default, aten.add.Tensor, aten.linear.default]
    for node in quantized.find(*integer):
        assert all(part.target in (WEIGHT, ACTIVATION) for part in node.all_input_nodes if part.op == "call_function"), node.name
    assert Counter(node.target for node in quantized.find(WEIGHT, ACTIVATION)) == {WEIGHT: 22, ACTIVATION: 32}


def test_a_convolution_is_rounded_after_its_relu_and_not_before(quantized: Graph) -> None:
    for node in quantized.find(aten.conv2d.default, aten.add.Tensor):
        (after,) = node.users
        assert after.target in (aten.relu.default, ACTIVATION)
    for node in quantized.find(aten.relu.default):
        (after,) = node.users
        assert after.target is ACTIVATION
        assert quantized.tensor(str(after.args[2].target)).item() == 0


def test_onnx_runtime_runs_it_in_integers(quantized: Graph, resnet: Task, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(to_onnx_bytes(quantized), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 21
    assert kinds["QLinearAdd"] == 9
    assert not kinds["Conv"] + kinds["FusedConv"] + kinds["Add"] + kinds["Relu"]
    x = torch.cat([x for x, _ in resnet.data("validation")])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = quantized(x)
    assert (torch.from_numpy(outputs) - expected).norm() <= 0.03 * expected.norm()


def test_the_file_gives_the_same_bits(quantized: Graph, resnet: Task) -> None:
    data, tensors = to_data(quantized)
    weights = [layer.weight for layer in layers(quantized)]
    assert all(tensors[name].dtype == torch.int8 for name in weights)
    rebuilt = from_data(json.loads(json.dumps(data)), tensors)
    for x, _ in resnet.data("validation"):
        with torch.no_grad():
            assert torch.equal(rebuilt(x), quantized(x))


def test_rounding_the_stored_integers_again_changes_nothing(quantized: Graph) -> None:
    data, tensors = to_data(quantized)
    again = to_data(from_data(data, tensors))[1]
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@pytest.mark.parametrize(("options", "most"), [({"weight_bits": 4}, 0.35), ({"activation_bits": 4}, 0.4), ({"observer": "minmax"}, 0.06)])
def test_options_cost_what_they_should(resnet: Task, options: dict[str, int], most: float) -> None:
    assert relative(compress(resnet, Static(**options)).graph, resnet) < most


def test_weights_and_scales_learn(resnet: Task) -> None:
    graph = compress(resnet, Static(weight_bits=3, rounding="nearest")).graph.requires_grad_(True).train()
    x = torch.cat([x for x, _ in resnet.data("validation")])
    with torch.no_grad():
        target = resnet.original(x)
    optimizer = torch.optim.Adam(graph.parameters(), 1e-4)
    errors = []
    for _ in range(8):
        error = (graph(x) - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    for layer in layers(graph):
        assert graph.tensor(layer.weight).grad.abs().sum() > 0, layer.name
        assert graph.tensor(f"{layer.weight}_scale").grad.abs().sum() > 0, layer.name
    assert errors[-1] < 0.9 * errors[0]


def test_the_gradient_of_a_scale_is_scaled_as_published(quantized: Graph) -> None:
    (node,) = [node for node in quantized.find(WEIGHT) if node.args[0].target == "blocks.0.conv1.weight"]
    assert read(node, "grad_factor") == pytest.approx(1 / (16 * 3 * 3 * 127) ** 0.5, rel=0.05)  # two digits of it


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_tells_every_layer(resnet: Task) -> None:
    graph = resnet.original.copy()
    before = graph.fingerprint()
    plan = Static(weight_bits=4, exclude="blocks.3.*").plan(graph, resnet)
    assert graph.fingerprint() == before
    assert json.loads(json.dumps(plan.changes)) == plan.changes
    assert plan.changes["conv"]["weight"] == {"bits": 8, "axis": 0}  # the first layer
    assert plan.changes["head"]["weight"] == {"bits": 8, "axis": 0}  # and the last
    assert plan.changes["blocks.0.conv1"]["weight"] == {"bits": 4, "axis": 0, "rounding": "gptq"}
    assert plan.changes["blocks.0.conv1"]["input"] == plan.changes["conv"]["output"]
    assert plan.skipped == {f"blocks.3.{name}": "excluded by name" for name in ("conv1", "conv2", "short.0")}


def test_what_is_excluded_stays_in_float(resnet: Task) -> None:
    graph = compress(resnet, Static(exclude="blocks.3.*")).graph
    for layer in layers(graph):
        assert (layer.quantizer() is None) == layer.name.startswith("blocks.3.")


def test_bias_correction_brings_the_means_back(resnet: Task) -> None:
    x = torch.cat([x for x, _ in resnet.data("calibration")])
    with torch.no_grad():
        means = {
            on: compress(resnet, Static(weight_bits=4, rounding="nearest", bias_correction=on)).graph(x).mean(0) for on in (False, True)
        }
        target = resnet.original(x).mean(0)
    assert (means[True] - target).norm() < 0.2 * (means[False] - target).norm()


def test_bias_correction_reports_its_shifts(resnet: Task) -> None:
    (record,) = compress(resnet, Static()).records
    assert set(record.measured["bias_shifts"]) == {layer.name for layer in layers(resnet.original) if layer.kind in ("conv", "linear")}


# --- where activations are rounded -----------------------------------------------------------------------------------


def placed(model: nn.Module, *shape: int) -> tuple[Graph, dict[str, set[str]]]:
    """The operators whose results are quantized, each with those that read it so; "*" stands for all."""
    graph = capture(model.eval(), torch.randn(2, *shape))
    placement = place(graph.fx, layers(graph))
    return graph, {value.name: {"*"} if readers is None else {r.name for r in readers} for value, readers in placement.readers.items()}


class Residual(nn.Module):
    """x + f(x), the sum read by a norm or not."""

    def __init__(self, inner: nn.Module, after: nn.Module):
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.inner(x))


def test_the_residual_stream_of_a_transformer_stays_in_float() -> None:
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    _, readers = placed(nn.Sequential(Residual(block, nn.Identity()), Residual(block, nn.LayerNorm(8)), nn.Linear(8, 3)), 5, 8)
    assert readers == {
        "layer_norm": {"linear"}, "gelu": {"linear_1"}, "layer_norm_1": {"linear_2"}, "gelu_1": {"linear_3"}, "layer_norm_2": {"linear_4"},
    }  # fmt: skip


def test_a_sum_of_convolutions_before_a_norm_stays_in_float() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x) + self.b(x))

    _, readers = placed(Sum(), 2, 4, 4)
    assert readers == {"leaves_0": {"conv2d", "conv2d_1"}, "conv2d": {"*"}, "conv2d_1": {"*"}}


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.relu(self.a(x)), self.b(x)], 1)
        return self.c(nn.functional.max_pool2d(y, 2))


def test_a_concatenation_shares_one_scale_and_pooling_keeps_it() -> None:
    x = torch.randn(4, 2, 8, 8)
    task = Task(Concatenated(), x, calibration=[(x, torch.zeros(4))])
    graph = compress(task, Static()).graph
    (cat,), (pool,) = graph.find(aten.cat.default), graph.find(aten.max_pool2d.default)
    around = [*cat.args[0], next(iter(cat.users)), next(iter(pool.users))]
    assert all(node.target is ACTIVATION for node in around)
    assert len({node.args[1].target for node in around}) == len({node.args[2].target for node in around}) == 1


def test_zeros_around_an_image_come_after_rounding() -> None:
    task = small(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2))
    graph = compress(task, Static()).graph
    (pad,) = graph.find(aten.pad.default)
    assert pad.args[0].target is ACTIVATION
    assert behind(pad) == {"aten.conv2d.default"}


def test_a_clip_at_six_is_not_exceeded() -> None:
    task = small(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        task.model[0].weight.mul_(100)
    graph = compress(task, Static(observer="minmax")).graph
    (clip,) = graph.find(aten.hardtanh.default, aten.relu6.default)
    (quantizer,) = clip.users
    scale = graph.tensor(str(quantizer.args[1].target))
    assert 255 * scale.item() == pytest.approx(6, rel=1e-6)


# --- layers of other kinds -------------------------------------------------------------------------------------------


def test_a_tied_table_has_one_quantizer() -> None:
    graph = compress(Trial(Static(), "tied_weights").task, Static()).graph
    shared = [layer for layer in layers(graph) if sum(other.weight == layer.weight for other in layers(graph)) > 1]
    assert {layer.kind for layer in shared} == {"embedding", "linear"}
    assert len({layer.quantizer() for layer in shared}) == 1


def test_a_tied_table_stays_in_float_with_its_partner() -> None:
    task = Trial(Static(), "tied_weights").task
    embedding = next(layer for layer in layers(task.original) if layer.kind == "embedding")
    plan = WeightOnly(exclude=embedding.name).plan(task.original.copy(), task)
    partner = next(layer for layer in layers(task.original) if layer.kind == "linear" and layer.weight == embedding.weight)
    assert plan.skipped[partner.name] == f"shares its weight with {embedding.name}, which stays in float"


def test_recurrent_weights_are_rounded() -> None:
    graph = compress(Trial(Static(), "lstm").task, Static()).graph
    recurrent = [layer for layer in layers(graph) if layer.kind == "rnn"]
    assert recurrent
    assert all(layer.quantizer() is not None for layer in recurrent)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_not_finite_is_skipped() -> None:
    task = small(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    graph = task.original.copy()
    graph.tensor("1.weight").data[0] = float("inf")
    plan = WeightOnly().plan(graph, task)
    assert list(plan.changes) == ["0"]
    assert "infinite" in plan.skipped["1"]


@pytest.mark.parametrize("second", [Static(), WeightOnly()])
def test_quantizing_twice_is_refused(second: Static | WeightOnly) -> None:
    with pytest.raises(StepError, match="quantized already"):
        compress(small(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), Recipe([Static(), second]))


def test_weights_on_a_grid_keep_it_when_activations_follow() -> None:
    task = small(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    recipe = compress(task, Recipe([WeightOnly(bits=4, edges=4), Static()]))
    assert [read(layer.quantizer(), "quant_max") for layer in layers(recipe.graph)] == [7, 7]
    assert all("weight" not in change and "input" in change for change in recipe.records[1].changes.values())


def test_two_methods_share_a_network() -> None:
    task = small(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    graph = compress(task, Recipe([WeightOnly(bits=4, edges=4, include="0"), Static(exclude="0")])).graph
    highest = [read(layer.quantizer(), "quant_max") for layer in layers(graph)]
    assert highest == [7, 127]


@pytest.mark.parametrize(
    "options",
    [{"weight_bits": 1}, {"weight_bits": 9}, {"activation_bits": 0}, {"edges": 16}, {"observer": "mode"}, {"samples": 0}],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(StepError):
        Static(**options)


def test_operators_without_integer_kernels_are_listed() -> None:
    made = small(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.GRU(16, 4, batch_first=True), shape=(5, 8))
    plan = Static(samples=4).plan(made.original.copy(), made)
    assert {name for name, reason in plan.skipped.items() if "no integer kernel" in reason} == {"gelu", "layer_norm", "gru"}
    assert set(plan.changes) >= {"0"}


@pytest.mark.parametrize("wrong", [torch.randn(4, 3, 6, 6), torch.ones(4, 3, 8, 8, dtype=torch.int64)], ids=["shape", "integers"])
def test_calibration_data_unlike_the_example_are_refused(wrong: torch.Tensor) -> None:
    made = small(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert made.example.shape[1:] == (3, 8, 8)
    made.calibration = [(wrong, 0)]
    with pytest.raises(TaskError, match=r"that of the example, \[3, 8, 8\]"):
        compress(made, Static())


def test_a_pattern_without_a_match_is_refused(resnet: Task) -> None:
    with pytest.raises(StepError, match=r"'blocks\.9\.\*' matches no layer"):
        Static(include="blocks.9.*").plan(resnet.original.copy(), resnet)


def test_signed_activations_and_one_scale_for_a_weight_reach_the_file(resnet: Task) -> None:
    graph = compress(resnet, Static(signed=True, per_channel=False)).graph
    assert relative(graph, resnet) < 0.12
    assert {(read(node, "quant_min"), read(node, "quant_max")) for node in graph.find(ACTIVATION)} == {(-128, 127)}
    model = onnx.load_from_string(to_onnx_bytes(graph))
    constants = {one.name: one for one in model.graph.initializer}
    scales = {node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    assert all(not constants[name].dims for name in scales)
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {constants[name].data_type for name in zeros} == {onnx.TensorProto.INT8}
    x = resnet.validation[0][0]
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {model.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        expected = graph(x)
    assert float((torch.from_numpy(found) - expected).norm() / expected.norm()) < 0.05


# --- when it loses too much ------------------------------------------------------------------------------------------


def fragile() -> Task:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6))
    return Task(model, x[:2], calibration=[(part, 0) for part in x.split(64)], name="fragile")


def test_what_loses_little_is_left_as_it_is() -> None:
    task = fragile()
    result = compress(task, Static(max_drop=5.0))
    choice = result.records[0].changes["all layers"]["choice"]
    assert choice["met"]
    assert len(choice["tried"]) == 1
    assert not {"repair", "raised", "kept"} & choice.keys()
    x = task.calibration[0][0]
    with torch.no_grad():
        assert torch.equal(result.graph(x), compress(task, Static()).graph(x))


def test_bits_are_raised_where_it_hurts_and_the_record_says_where() -> None:
    task = fragile()
    before, after = (compress(task, Static(weight_bits=2, rounding="nearest", max_drop=drop)) for drop in (None, 4.0))
    x = torch.cat([x for x, _ in task.calibration])
    with torch.no_grad():
        differ = [float((graph(x).argmax(1) != task.original(x).argmax(1)).double().mean()) for graph in (before.graph, after.graph)]
    assert 100 * differ[0] > 4.0 >= 100 * differ[1]
    changes = after.records[0].changes
    choice = changes["all layers"]["choice"]
    assert choice["drop"] == pytest.approx(100 * differ[1])
    assert {row.get("repair") for row in choice["tried"]} >= {None, "ranges", "smooth"}
    assert choice["raised"]
    bits = {name: changes[name]["weight"]["bits"] for name in ("0", "2", "4", "6")}
    assert bits == {name: 8 if name in (*choice["raised"], "0", "6") else 2 for name in bits}


def test_a_drop_out_of_reach_gives_the_best_and_says_so() -> None:
    task = fragile()
    (record,) = compress(task, Static(activation_bits=2, max_drop=0.0)).records
    choice = record.changes["all layers"]["choice"]
    assert not choice["met"]
    assert choice["drop"] == pytest.approx(min(row["drop"] for row in choice["tried"]), abs=1e-3)
    assert all("lost too much" in record.skipped[name] for name in choice["kept"])
    with pytest.raises(StepError, match="no drop below 0"):
        Static(max_drop=-1.0)
