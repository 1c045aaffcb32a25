"""Classifiers of images: residual, dense, depthwise, grouped, shuffled, gated channels; what runs over channels in other ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, entry


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU; the size of the image is kept at stride 1."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def classifier(*body: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


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
    return classifier(conv(3, 8), Residual(8, 8, 1), Residual(8, 16, 2), channels=16), torch.randn(2, 3, 16, 16)


class Bottleneck(nn.Module):
    """As in ResNet-50; with groups, as in ResNeXt."""

    def __init__(self, inputs: int, width: int, stride: int, groups: int = 1, expansion: int = 4):
        super().__init__()
        outputs = width * expansion
        self.body = nn.Sequential(
            conv(inputs, width, 1),
            conv(width, width, 3, stride, groups),
            nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def bottlenecks(depths: tuple[int, ...], width: int, classes: int, groups: int = 1) -> nn.Sequential:
    """ResNet-50 is `bottlenecks((3, 4, 6, 3), 64, 1000)`."""
    blocks: list[nn.Module] = [conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, depth in enumerate(depths):
        for place in range(depth):
            stride = 2 if stage and not place else 1
            blocks.append(Bottleneck(inputs, width << stage, stride, groups))
            inputs = 4 * width << stage
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@entry
def resnet_bottleneck() -> Entry:
    return bottlenecks((1, 1), 8, 5), torch.randn(2, 3, 32, 32)


@entry
def resnext() -> Entry:
    return bottlenecks((2, 1), 8, 5, groups=4), torch.randn(2, 3, 32, 32)


class Padded(nn.Module):
    """A residual network whose shortcut gets its new channels by padding with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 16, stride=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@entry
def resnet_padded() -> Entry:
    return Padded(), torch.randn(2, 3, 16, 16)


@entry
def vgg() -> Entry:
    body = (conv(3, 8), conv(8, 8), nn.MaxPool2d(2), conv(8, 16), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(3), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(144, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5)), torch.randn(2, 3, 16, 16)


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


class Excite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


@entry
def squeeze_excite() -> Entry:
    return classifier(conv(3, 8), Excite(8), conv(8, 8), channels=8), torch.randn(2, 3, 12, 12)


class Mixed(nn.Module):
    """Residual sum, concatenation, depthwise, grouped, squeeze and excite, flatten into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.point = conv(3, 16), conv(16, 16, 3, 1, 16), conv(16, 16, 1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Linear(48, 12), nn.Linear(12, 48)
        self.hidden, self.head = nn.Linear(48 * 16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.point(self.depthwise(x))
        x = torch.cat([x, F.hardswish(self.grouped(x))], 1)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = F.adaptive_avg_pool2d(x * scale[:, :, None, None], 4)
        return self.head(F.gelu(self.hidden(x.flatten(1))))  # type: ignore[no-any-return]


@entry
def mixed() -> Entry:
    return Mixed(), torch.randn(2, 3, 16, 16)


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


class SplitShuffle(nn.Module):
    """Half of the channels pass, half are worked on, then all are shuffled: by PyTorch's operator or by views."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(nn.Sequential(conv(8, 8, 1), conv(8, 8, groups=8), conv(8, 8, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for place, block in enumerate(self.blocks):
            left, right = x.chunk(2, 1)
            x = torch.cat([left, block(right)], 1)
            n, c, h, w = x.shape
            x = F.channel_shuffle(x, 2) if place else x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@entry
def shufflenet_v2() -> Entry:
    return SplitShuffle(), torch.randn(2, 3, 12, 12)


class Branches(nn.Module):
    """Four ways side by side, joined, one of them through pooling."""

    def __init__(self, inputs: int):
        super().__init__()
        self.ways = nn.ModuleList(
            [conv(inputs, 4, 1), nn.Sequential(conv(inputs, 4, 1), conv(4, 8)), nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(inputs, 4, 1))]
        )
        self.row, self.column = nn.Conv2d(inputs, 4, (1, 3), padding=(0, 1)), nn.Conv2d(inputs, 4, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(way(x) for way in self.ways), F.relu(torch.cat([self.row(x), self.column(x)], 1))], 1)


@entry
def inception() -> Entry:
    return classifier(conv(3, 8), Branches(8), Branches(24), channels=24), torch.randn(2, 3, 12, 12)


class Ghost(nn.Module):
    """Half of the channels are made from the other half by a cheap depthwise convolution; a few too many are sliced off."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = conv(inputs, outputs // 2 + 1, 1)
        self.cheap = conv(outputs // 2 + 1, outputs // 2 + 1, 3, 1, outputs // 2 + 1)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([x, self.cheap(x)], 1)[:, : self.outputs]


@entry
def ghostnet() -> Entry:
    return classifier(conv(3, 8), Ghost(8, 16), Ghost(16, 12), channels=12), torch.randn(2, 3, 12, 12)


class ConvNext(nn.Module):
    """Depthwise convolution, layer norm over channels that stand last, a perceptron, a scale per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(channels, channels, 7, 1, 3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down, self.scale = nn.Linear(channels, 32), nn.Linear(32, channels), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + (self.scale * y).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


@entry
def convnext() -> Entry:
    body = (nn.Conv2d(3, 8, 4, 4), ConvNext(8), nn.Conv2d(8, 12, 2, 2), ConvNext(12))
    return classifier(*body, channels=12), torch.randn(2, 3, 16, 16)


class Mixer(nn.Module):
    """A perceptron over patches, then one over channels."""

    def __init__(self, patches: int, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.patches = nn.Sequential(nn.Linear(patches, 24), nn.GELU(), nn.Linear(24, patches))
        self.channels = nn.Sequential(nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))  # type: ignore[no-any-return]


class Patches(nn.Module):
    def __init__(self, channels: int, *blocks: nn.Module):
        super().__init__()
        self.cut, self.blocks, self.head = nn.Conv2d(3, channels, 4, 4), nn.Sequential(*blocks), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.cut(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


@entry
def mlp_mixer() -> Entry:
    return Patches(16, Mixer(16, 16), Mixer(16, 16)), torch.randn(2, 3, 16, 16)
