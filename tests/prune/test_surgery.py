"""What is left after a cut computes what the whole computes when the cut channels are zero: on networks of many kinds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multum import Graph, Task, capture, compress, prune
from multum.errors import GraphError
from multum.graph import spec
from multum.graph.axes import axes
from multum.graph.file import from_data, to_data
from multum.graph.surgery import cut
from multum.task import call

IMAGES, IDS = torch.randn(2, 3, 16, 16), torch.randint(0, 30, (2, 8))


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(outputs), nn.SiLU())


class Mixed(nn.Module):
    """Residual sum, concatenation, depthwise, grouped, squeeze and excite, flatten into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.point = conv(3, 16), conv(16, 16, groups=16), conv(16, 16, 1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Linear(48, 12), nn.Linear(12, 48)
        self.hidden, self.head = nn.Linear(48 * 16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.point(self.depthwise(x))
        x = torch.cat([x, F.hardswish(self.grouped(x))], 1)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = F.adaptive_avg_pool2d(x * scale[:, :, None, None], 4)
        return self.head(F.gelu(self.hidden(x.flatten(1))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.down2, self.middle = conv(16, 16), conv(16, 16)
        self.up, self.up1, self.up2, self.head = nn.ConvTranspose2d(16, 8, 2, 2), conv(24, 8), conv(24, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.up1(torch.cat([self.up(self.middle(F.avg_pool2d(b, 2))), b], 1))
        return self.head(self.up2(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), a], 1)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], projection: int = 0, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.rnn = kind(12, 16, 2, batch_first=True, **options, **({"proj_size": projection} if projection else {}))
        self.head = nn.Linear((projection or 16) * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0].mean(1))


class Shuffled(nn.Module):
    """Half of the channels pass, half are worked on, then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Sequential(conv(8, 8, 1), conv(8, 8, groups=8), conv(8, 8, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, block(right)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(x.mean((2, 3)))


class CrossStage(nn.Module):
    """As in a YOLO: a convolution is split, its second half goes on, everything is concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.start, self.end = conv(inputs, outputs, 1), conv(2 * outputs, outputs, 1)
        self.inner = nn.ModuleList(conv(outputs // 2, outputs // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.start(x).split(self.start[0].out_channels // 2, 1))
        for block in self.inner:
            parts.append(parts[-1] + block(parts[-1]))
        return self.end(torch.cat(parts, 1))


class Detector(nn.Module):
    """Cross-stage blocks, pooling in a pyramid, and a head that reads distributions over distances."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.pool = conv(3, 8), CrossStage(8, 16), nn.MaxPool2d(5, 1, 2)
        self.merge, self.box, self.kind = conv(64, 16, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 5, 1)
        self.register_buffer("distances", torch.arange(8.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        parts = [self.block(self.stem(x))]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        x = self.merge(torch.cat(parts, 1))
        box = self.box(x).flatten(2)
        spread = box.view(box.shape[0], 4, 8, box.shape[2]).transpose(2, 1).softmax(1)
        return {"box": (spread * self.distances.view(1, 8, 1, 1)).sum(1), "kind": self.kind(x).flatten(2).sigmoid()}


class Attention(nn.Module):
    """One fused projection of q, k and v, heads taken by a view, a gated perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 3)
        self.qkv, self.out, self.gate, self.down = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 64), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(F.layer_norm(x, (c,))).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        gate, up = self.gate(F.layer_norm(x, (c,))).chunk(2, -1)
        return self.head((x + self.down(gate * F.gelu(up))).mean(1))


class Grouped(nn.Module):
    """Grouped-query attention with rotary positions, inside PyTorch's own attention operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.kv, self.out, self.head = (
            nn.Embedding(30, 16), nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3),
        )  # fmt: skip
        self.register_buffer("frequency", torch.rand(4))

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * self.frequency
        angle = torch.cat([angle, angle], -1)
        return x * angle.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 8).transpose(1, 2)
        k, v = (part.view(b, n, 2, 8).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True, enable_gqa=True)
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, n, 32)))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.slope, self.b, self.c, self.d = conv(3, 16), nn.PReLU(16), conv(16, 32), conv(8, 8), nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.d(self.c(F.pixel_shuffle(self.b(self.slope(self.a(x))), 2))), 2)


class OtherDimensions(nn.Module):
    """Convolutions over one and three dimensions, gated linear units, einsum, a transposed one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(4, 16, 3), nn.InstanceNorm1d(16, affine=True), nn.Conv1d(16, 16, 3)
        self.c, self.d, self.e = nn.Conv3d(1, 16, 3, padding=1), nn.ConvTranspose3d(16, 8, 2, 2, groups=2), nn.Conv3d(8, 2, 1)
        self.mix, self.head = nn.Parameter(torch.randn(16, 12)), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.a(x))
        y = torch.einsum("bcl,cd->bld", self.b(F.glu(torch.cat([y, y.relu()], 1), 1)), self.mix)
        return self.head(y.mean(1)), self.e(self.d(F.relu(self.c(x[:, None, :, :16].reshape(-1, 1, 4, 4, 4)))))


class PaddedShortcut(nn.Module):
    """A shortcut that gets its new channels by padding with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 16, stride=2), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head((self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = conv(3, 8), nn.ModuleList(conv(8 + 6 * place, 6) for place in range(3))
        self.narrow, self.head = nn.Conv2d(26, 12, 1), nn.Linear(12 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(F.avg_pool2d(self.narrow(x), 4).flatten(1))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mixed": lambda: (Mixed(), IMAGES),
    "u-net": lambda: (UNet(), IMAGES),
    "lstm": lambda: (Recurrent(nn.LSTM, bidirectional=True), IDS),
    "lstm with projection": lambda: (Recurrent(nn.LSTM, 8), IDS),
    "gru": lambda: (Recurrent(nn.GRU), IDS),
    "rnn": lambda: (Recurrent(nn.RNN, bidirectional=True), IDS),
    "shuffled": lambda: (Shuffled(), IMAGES),
    "detector": lambda: (Detector(), IMAGES),
    "attention": lambda: (Attention(), IMAGES),
    "grouped queries": lambda: (Grouped(), IDS),
    "multi-head": lambda: (nn.Sequential(nn.Linear(6, 24), nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)), torch.randn(2, 5, 6)),
    "pixels": lambda: (Pixels(), IMAGES),
    "1d and 3d": lambda: (OtherDimensions(), torch.randn(2, 4, 20)),
    "padded shortcut": lambda: (PaddedShortcut(), IMAGES),
    "dense": lambda: (Dense(), IMAGES),
}


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def lively(model: nn.Module) -> nn.Module:
    """In double precision, with statistics, scales and shifts that no mistake can hide behind."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                if value.is_floating_point():
                    value.data = torch.rand_like(value) + (0.5 if "var" in name or "weight" in name else -0.5)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def outputs(graph: Graph, inputs: Any) -> list[Tensor]:
    return spec.flatten(call(graph, inputs), graph.outputs)


def largest(batch: Any) -> Any:
    """The batch three times over."""
    return {key: largest(value) for key, value in batch.items()} if isinstance(batch, dict) else torch.cat([batch] * 3)


def examine(model: nn.Module, example: Any, masked: Callable[..., list[Tensor]]) -> None:
    """Cuts a quarter, a half and three quarters; compares, trains a step, runs a larger batch, and writes and reads the graph."""
    example = doubled(example)
    task = Task(lively(model), example)
    whole = outputs(task.original, example)
    left = [sum(p.numel() for p in task.original.parameters())]
    for ratio in (0.25, 0.5, 0.75):
        result = compress(task, prune.Channels(ratio=ratio))
        graph, keep = result.graph, {name: change["keep"] for name, change in result.records[0].changes.items()}
        inputs = ((), example) if isinstance(example, dict) else ((example,), {})
        with torch.no_grad():
            for mine, reference, before in zip(outputs(graph, example), masked(task.original, keep, inputs), whole, strict=True):
                torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10 * float(reference.abs().max()))
                assert len(whole) > 1 or not torch.allclose(mine, before, rtol=1e-6)
        left.append(sum(p.numel() for p in graph.parameters()))
        train_one_step(graph, example)
        again = from_data(*to_data(graph))
        for mine, reread in zip(outputs(graph, largest(example)), outputs(again, largest(example)), strict=True):
            assert mine.shape[0] % 3 == 0
            assert torch.equal(mine, reread)
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 2


def train_one_step(graph: Graph, example: Any) -> None:
    graph.train()
    sum(output.pow(2).mean() for output in outputs(graph, example)).backward()
    missing = [name for name, parameter in graph.tensors.named_parameters() if parameter.grad is None]
    assert not missing
    before = {name: parameter.detach().clone() for name, parameter in graph.tensors.named_parameters()}
    torch.optim.SGD(graph.parameters(), 0.01).step()
    assert any(not torch.equal(before[name], parameter) for name, parameter in graph.tensors.named_parameters())
    graph.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_equals_the_whole_with_the_cut_channels_at_zero(name: str, masked: Callable[..., list[Tensor]]) -> None:
    torch.manual_seed(0)
    examine(*NETWORKS[name](), masked)


TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 48}


def transformer(name: str, attention: str) -> tuple[nn.Module, Any]:
    import transformers as hf

    words = {"input_ids": IDS, "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    common = {"attn_implementation": attention}
    if name == "vit":
        return hf.ViTForImageClassification(hf.ViTConfig(**TINY, **common, image_size=16, patch_size=8)), IMAGES
    if name == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**TINY, **common, vocab_size=30, max_position_embeddings=32)), words
    if name == "gpt2":
        config = hf.GPT2Config(
            **common, n_layer=2, n_embd=24, n_head=4, vocab_size=30, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0
        )
        return hf.GPT2LMHeadModel(config), {"input_ids": IDS}
    if name == "llama":
        config = hf.LlamaConfig(**TINY, **common, num_key_value_heads=2, vocab_size=30, max_position_embeddings=32, use_cache=False)
        return hf.LlamaForCausalLM(config), {"input_ids": IDS}
    if name == "t5":
        config = hf.T5Config(d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4, vocab_size=30, use_cache=False)
        return hf.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return hf.SwinForImageClassification(config), torch.randn(2, 3, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "t5", "swin"])
def test_transformers_too(name: str, attention: str, masked: Callable[..., list[Tensor]]) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    examine(*transformer(name, attention), masked)


def test_against_the_original_module_with_its_weights_set_to_zero() -> None:
    """The same claim without the analysis: zeros where the next layer reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 2, 1)).double().eval()
    graph = capture(model, IMAGES.double())
    cut(graph, {"0:out": [1, 4]})
    assert graph.tensor("0.weight").shape == (2, 3, 3, 3)
    model[3].weight.data[:, [0, 2, 3, 5]] = 0
    torch.testing.assert_close(graph(IMAGES.double()), model(IMAGES.double()), rtol=1e-12, atol=1e-12)


def test_in_single_precision_the_two_agree_to_a_hundred_thousandth(masked: Callable[..., list[Tensor]]) -> None:
    graph = capture(lively(Mixed()).float(), IMAGES)
    keep = {group.name: list(range(0, group.size, 2)) for group in axes(graph) if not group.reason and group.name != "grouped:out[0]"}
    (reference,) = masked(graph, keep, ((IMAGES,), {}))
    cut(graph, keep)
    torch.testing.assert_close(graph(IMAGES), reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_heads_and_their_width_can_be_cut_together_and_the_scale_stays(masked: Callable[..., list[Tensor]]) -> None:
    images = IMAGES.double()
    graph = capture(lively(Attention()), images)
    keep = {"qkv:out[1]": [0, 3], "qkv:out[2]": [1, 2, 5]}
    (reference,) = masked(graph, keep, ((images,), {}))
    cut(graph, keep)
    assert graph.tensor("qkv.weight").shape == (3 * 2 * 3, 24)
    torch.testing.assert_close(graph(images), reference, rtol=1e-10, atol=1e-12)


def test_gradients_and_frozen_parameters_stay_what_they_were() -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    graph.tensor("0.bias").requires_grad_(False)
    graph(torch.ones(2, 3)).sum().backward()
    gradient = graph.tensor("2.weight").grad.clone()
    cut(graph, {"0:out": [0, 3]})
    assert not graph.tensor("0.bias").requires_grad
    assert torch.equal(graph.tensor("2.weight").grad, gradient[:, [0, 3]])


def test_the_scales_of_a_quantized_weight_are_cut_with_it() -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    (first, _) = graph.find(torch.ops.aten.linear.default)
    graph.set_tensor("scale", torch.tensor([0.1, 0.2, 0.3, 0.4]))
    graph.set_tensor("zero", torch.zeros(4, dtype=torch.int32))
    scale, zero = graph.attribute("scale", first), graph.attribute("zero", first)
    with graph.fx.inserting_before(first):
        node = graph.fx.call_function(torch.ops.aten.fake_quantize_per_channel_affine.default, (first.args[1], scale, zero, 0, -128, 127))
    first.update_arg(1, node)
    graph.recompile()
    graph.refresh()
    cut(graph, {"0:out": [1, 3]})
    assert graph.tensor("scale").tolist() == pytest.approx([0.2, 0.4])
    assert graph(torch.ones(2, 3)).shape == (2, 2)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"0:uot": [0]}, "'0:out'"),
        ({"2:out": [0]}, "output of the model"),
        ({"0:out": []}, r"0\.\.3"),
        ({"0:out": [2, 1]}, "increasing"),
        ({"0:out": [1, 4]}, r"0\.\.3"),
    ],
)
def test_what_cannot_be_cut_is_an_error_and_changes_nothing(keep: dict[str, list[int]], message: str) -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    before = graph.fingerprint()
    with pytest.raises(GraphError, match=message):
        cut(graph, keep)
    assert graph.fingerprint() == before
