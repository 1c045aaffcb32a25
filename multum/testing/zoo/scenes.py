"""Images and volumes in, images or boxes out: encoders and decoders, detection heads, larger pixels, other norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, entry
from .images import conv


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


class GroupedUNet(nn.Module):
    """Group norm, and transposed convolutions in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.GroupNorm(8, 16), nn.SiLU())
        self.up, self.head = nn.ConvTranspose2d(16, 8, 2, 2, groups=2), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.head(torch.cat([x, F.leaky_relu(self.up(self.middle(x)))], 1))  # type: ignore[no-any-return]


@entry
def unet_group_norm() -> Entry:
    return GroupedUNet(), torch.randn(2, 3, 12, 12)


class Pixels(nn.Module):
    """Channels become pixels, twice, and pixels channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.slope, self.b, self.c = conv(12, 16), nn.PReLU(16), conv(16, 32), conv(8, 8)
        self.d = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.a(F.pixel_unshuffle(x, 2)))
        return F.pixel_shuffle(self.d(self.c(F.pixel_shuffle(self.b(x), 2))), 2)


@entry
def super_resolution() -> Entry:
    return Pixels(), torch.randn(2, 3, 12, 12)


@entry
def style_transfer() -> Entry:
    """Instance norm, padding by reflection, transposed convolution."""

    def normed(layer: nn.Module, channels: int) -> list[nn.Module]:
        return [layer, nn.InstanceNorm2d(channels, affine=True), nn.ReLU()]

    body = [nn.ReflectionPad2d(1), *normed(nn.Conv2d(3, 8, 3), 8), *normed(nn.Conv2d(8, 16, 3, 2, 1), 16)]
    return nn.Sequential(*body, *normed(nn.ConvTranspose2d(16, 8, 4, 2, 1), 8), nn.Conv2d(8, 3, 1), nn.Tanh()), torch.randn(2, 3, 12, 12)


class Autoencoder(nn.Module):
    """Flattens to a code and back: `view` into channels and pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv(1, 8, 3, 2), conv(8, 16, 3, 2), nn.Flatten(), nn.Linear(16 * 9, 12))
        self.mean, self.spread, self.decode = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(6, 16 * 9)
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 3, 2, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 1, 3, 2, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.tanh(self.encode(x))
        hidden = self.mean(code) * torch.exp(self.spread(code))
        return self.up(F.relu(self.decode(hidden)).view(-1, 16, 3, 3)), hidden.norm(dim=1)


@entry
def autoencoder() -> Entry:
    return Autoencoder(), torch.randn(2, 1, 12, 12)


@entry
def conv3d() -> Entry:
    body = (nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 16, 3, padding=1, groups=2))
    return nn.Sequential(*body, nn.ReLU(), nn.ConvTranspose3d(16, 8, 2, 2), nn.Conv3d(8, 2, 1)), torch.randn(2, 1, 4, 8, 8)


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
        volume = x[:, None, :, :16].reshape(-1, 1, 4, 4, 4)
        return self.head(y.mean(1)), self.e(self.d(F.relu(self.c(volume))))


@entry
def other_dimensions() -> Entry:
    return OtherDimensions(), torch.randn(2, 4, 20)


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


class CrossStage(nn.Module):
    """As in a YOLO: a convolution is split, its second half goes on, everything is concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.start, self.end = conv(inputs, outputs, 1), conv(2 * outputs, outputs, 1)
        self.inner = nn.ModuleList(conv(outputs // 2, outputs // 2) for _ in range(2))
        self.width = outputs // 2

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.start(x).split(self.width, 1))
        for block in self.inner:
            parts.append(parts[-1] + block(parts[-1]))
        return self.end(torch.cat(parts, 1))  # type: ignore[no-any-return]


class Yolo(nn.Module):
    """Cross-stage blocks, pooling in a pyramid, and a head that reads distributions over distances."""

    distances: Tensor

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


@entry
def yolo() -> Entry:
    return Yolo(), torch.randn(2, 3, 12, 12)


class Pyramid(nn.Module):
    """Features of two sizes are added; one head, with group norm, reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv(3, 8), conv(8, 16, 3, 2)
        self.lateral, self.top = nn.Conv2d(8, 12, 1), nn.Conv2d(16, 12, 1)
        self.head = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU())
        self.boxes, self.kinds = nn.Conv2d(12, 2 * 4, 1), nn.Conv2d(12, 2 * 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)
        top = self.top(self.coarse(fine))
        levels = [self.head(level) for level in (self.lateral(fine) + F.interpolate(top, scale_factor=2.0), top)]
        boxes, kinds = ([self.flat(head(level), size) for level in levels] for head, size in ((self.boxes, 4), (self.kinds, 3)))
        return torch.cat(boxes, 1), torch.cat(kinds, 1)

    def flat(self, x: Tensor, size: int) -> Tensor:
        """Two anchors at every place [batch, anchors, size]."""
        n, _, h, w = x.shape
        return x.view(n, 2, size, h, w).permute(0, 3, 4, 1, 2).reshape(n, h * w * 2, size)


@entry
def retinanet() -> Entry:
    return Pyramid(), torch.randn(2, 3, 12, 12)
