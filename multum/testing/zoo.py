"""Tiny models of the kinds that users bring, with random weights: `ZOO[name]()` gives a model and an example batch of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MissingExtra

Entry = tuple[nn.Module, Any]
ZOO: dict[str, Callable[[], Entry]] = {}


def entry(make: Callable[[], Entry]) -> Callable[[], Entry]:
    def seeded() -> Entry:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, example = make()
            return _settled(model), example

    ZOO[make.__name__] = seeded
    return seeded


def _settled(model: nn.Module) -> nn.Module:
    """The model in eval mode, its batch norms with statistics and scales that differ from those they start with."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU; the size of the image is kept at stride 1."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.conv1(x)))
        y += self.short(x)
        return F.relu(y)


@entry
def resnet() -> Entry:
    body = (conv(3, 8), Residual(8, 8, 1), Residual(8, 16, 2))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), torch.randn(2, 3, 16, 16)


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.expand, self.depthwise = conv(inputs, 4 * inputs, 1), conv(4 * inputs, 4 * inputs, 3, stride, 4 * inputs)
        self.project = nn.Sequential(nn.Conv2d(4 * inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


@entry
def mobilenet() -> Entry:
    body = (conv(3, 8, 3, 2), Inverted(8, 8, 1), Inverted(8, 12, 2), conv(12, 24, 1))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 5)), torch.randn(2, 3, 16, 16)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, 1, 1)) for i in range(3))
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return self.head(torch.cat(parts, 1).mean((2, 3)))  # type: ignore[no-any-return]


@entry
def densenet() -> Entry:
    return Dense(), torch.randn(2, 3, 12, 12)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 8), conv(8, 16), conv(16, 16)
        self.up2, self.up1 = conv(32, 8), nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        c = F.interpolate(c, scale_factor=2, mode="bilinear", align_corners=False)
        c = self.up2(torch.cat([b, c], 1))
        c = F.interpolate(c, size=a.shape[2:], mode="nearest")
        return self.head(self.up1(F.avg_pool2d(torch.cat([a, c], 1), 2)))  # type: ignore[no-any-return]


@entry
def unet() -> Entry:
    return UNet(), torch.randn(2, 3, 16, 16)


class Excite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


@entry
def squeeze_excite() -> Entry:
    return nn.Sequential(conv(3, 8), Excite(8), conv(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), torch.randn(
        2, 3, 12, 12
    )


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped1, self.grouped2 = conv(3, 12), conv(12, 12, 1, 1, 3), conv(12, 12, 3, 1, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped1(self.stem(x))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.grouped2(x).mean((2, 3)))  # type: ignore[no-any-return]


@entry
def shufflenet() -> Entry:
    return Shuffle(), torch.randn(2, 3, 12, 12)


@entry
def conv1d() -> Entry:
    body = (nn.Conv1d(4, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ELU(), nn.Conv1d(8, 16, 3, padding="same"), nn.GroupNorm(4, 16), nn.GELU())
    return nn.Sequential(*body, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 5)), torch.randn(2, 4, 20)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], both: bool):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.rnn = cell(8, 12, num_layers=1 if both else 2, batch_first=True, bidirectional=both)
        self.head = nn.Linear(24 if both else 12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(tokens))
        return self.head(states[:, -1])  # type: ignore[no-any-return]


@entry
def lstm() -> Entry:
    return Recurrent(nn.LSTM, both=False), torch.randint(0, 50, (2, 7))


@entry
def bidirectional_gru() -> Entry:
    return Recurrent(nn.GRU, both=True), torch.randint(0, 50, (2, 7))


@entry
def mlp() -> Entry:
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5)), torch.randn(2, 10)


class Detector(nn.Module):
    """A head as in YOLO: channels are split, some go through a block, all are joined; boxes and classes come apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.join = conv(3, 16, 3, 2), conv(8, 8), conv(24, 16, 1)
        self.out = nn.Conv2d(16, 4 + 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = self.stem(x).chunk(2, 1)
        y = self.out(self.join(torch.cat([a, b, self.inner(b)], 1))).flatten(2)
        boxes, classes = y.split([4, 3], 1)
        return {"boxes": boxes.sigmoid().transpose(1, 2), "classes": classes.transpose(1, 2)}


@entry
def detector() -> Entry:
    return Detector(), torch.randn(2, 3, 16, 16)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, pair: tuple[Tensor, Tensor], scale: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        left, right = F.relu(self.left(pair[0])), F.relu(self.right(pair[1]))
        joined = left * right if scale is None else left * right * scale
        return self.head(joined), {"left": left, "right": right}


@entry
def tuple_inputs() -> Entry:
    return TwoTowers(), ((torch.randn(2, 6), torch.randn(2, 4)),)


@entry
def keyword_inputs() -> Entry:
    return TwoTowers(), {"pair": (torch.randn(2, 6), torch.randn(2, 4)), "scale": torch.rand(2, 1)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.block(self.embedding(tokens))))  # type: ignore[no-any-return]


@entry
def tied_weights() -> Entry:
    return Tied(), torch.randint(0, 40, (2, 6))


def _transformer(kind: str, config: str, example: Any, **options: Any) -> Entry:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "examples", f"The model {kind}") from error
    settings = getattr(transformers, config)(**options)
    settings.use_cache = False
    return getattr(transformers, kind)(settings), example


_IDS = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@entry
def bert() -> Entry:
    return _transformer("BertForSequenceClassification", "BertConfig", _IDS, vocab_size=60, max_position_embeddings=16, **_SMALL)


@entry
def distilbert() -> Entry:
    options = {"vocab_size": 60, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 16}
    return _transformer("DistilBertForSequenceClassification", "DistilBertConfig", _IDS, **options)


@entry
def vit() -> Entry:
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    return _transformer("ViTForImageClassification", "ViTConfig", example, image_size=16, patch_size=8, num_labels=5, **_SMALL)


@entry
def gpt2() -> Entry:
    options = {"vocab_size": 60, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return _transformer("GPT2LMHeadModel", "GPT2Config", {"input_ids": _IDS["input_ids"]}, **options)


@entry
def llama() -> Entry:
    options = _SMALL | {"num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 16}
    return _transformer("LlamaForCausalLM", "LlamaConfig", {"input_ids": _IDS["input_ids"]}, **options)


@entry
def t5_encoder() -> Entry:
    options = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return _transformer("T5EncoderModel", "T5Config", {"input_ids": _IDS["input_ids"]}, **options)


class Branching(nn.Module):
    """Cannot be captured whole: which block runs depends on the data. Its `body` can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.small, self.large = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.small(x) if bool((x.sum() > 0).item()) else self.large(x)  # type: ignore[no-any-return]


def branching() -> Entry:
    """Not in `ZOO`: the model that capture must refuse, with a way out."""
    return Branching(), torch.randn(2, 6)
