"""Attention written out: fused and shared projections, rotary positions, windows, PyTorch's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, entry


class Fused(nn.Module):
    """One projection for q, k and v, heads taken by a view; a perceptron with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 5)
        self.qkv, self.out, self.gate, self.down = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 64), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(F.layer_norm(x, (c,))).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        gate, up = self.gate(F.layer_norm(x, (c,))).chunk(2, -1)
        return self.head((x + self.down(gate * F.gelu(up))).mean(1))  # type: ignore[no-any-return]


@entry
def fused_attention() -> Entry:
    return Fused(), torch.randn(2, 3, 16, 16)


class SharedHeads(nn.Module):
    """Two key-value heads for four query heads, rotary positions, norms by the root of the mean square."""

    frequency: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Embedding(40, 16), nn.RMSNorm(16), nn.RMSNorm(16, eps=1e-6)
        self.q, self.kv, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.up, self.down, self.head = nn.Linear(16, 48), nn.Linear(24, 16), nn.Linear(16, 5)
        self.register_buffer("frequency", torch.rand(4))

    def turn(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * self.frequency
        angle = torch.cat([angle, angle], -1)
        return x * angle.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * angle.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, n, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(b, n, 4, 8).transpose(1, 2)
        k, v = (part.view(b, n, 2, 8).transpose(1, 2) for part in self.kv(y).chunk(2, -1))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, 32))
        return self.head(x + self.down(F.glu(self.up(self.norm2(x)))))  # type: ignore[no-any-return]


@entry
def grouped_queries() -> Entry:
    return SharedHeads(), torch.randint(0, 40, (2, 6))


class Windows(nn.Module):
    """Attention inside of windows of an image, eager, with a table of relative positions; the image is rolled before and after."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 16, 2, 2), nn.LayerNorm(16), nn.Linear(16, 5)
        self.qkv, self.out, self.table = nn.Linear(16, 48), nn.Linear(16, 16), nn.Parameter(torch.randn(7 * 7, 4))
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + 3
        self.register_buffer("positions", apart[0] * 7 + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.positions.view(-1)].view(16, 16, 4).permute(2, 0, 1)
        y = ((q * (c // 4) ** -0.5) @ k.transpose(2, 3) + bias).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head((x + torch.roll(y, (2, 2), (1, 2))).mean((1, 2)))  # type: ignore[no-any-return]


@entry
def windowed_attention() -> Entry:
    return Windows(), torch.randn(2, 3, 16, 16)


@entry
def encoder_layers() -> Entry:
    """PyTorch's own transformer layers."""
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
    return nn.Sequential(nn.Linear(6, 24), layer, nn.Linear(24, 5)), torch.randn(2, 5, 6)


class Linear(nn.Module):
    """Attention without a softmax over places: keys and values are summed first. Channels attend to channels beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.qkv, self.out, self.cross, self.head = (
            nn.Linear(6, 16), nn.Linear(16, 48, bias=False), nn.Linear(16, 16), nn.Linear(16, 48, bias=False), nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        b, n, c = x.shape
        q, k, v = (part.view(b, n, 4, c // 4) for part in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = torch.einsum("bnhd,bhde->bnhe", q, torch.einsum("bnhd,bnhe->bhde", k, v))
        y = y / torch.einsum("bnhd,bhd->bnh", q, k.sum(1))[..., None]
        x = x + self.out(y.reshape(b, n, c))
        q, k, v = (F.normalize(part.view(b, n, 4, c // 4).permute(0, 2, 3, 1), dim=-1) for part in self.cross(x).chunk(3, -1))
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.head(x + y.permute(0, 3, 1, 2).reshape(b, n, c))  # type: ignore[no-any-return]


@entry
def linear_attention() -> Entry:
    return Linear(), torch.randn(2, 5, 6)
