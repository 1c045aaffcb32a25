"""Networks over rows and points; inputs and outputs with structure; and one that cannot be captured."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry, entry


@entry
def mlp() -> Entry:
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5)), torch.randn(2, 10)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, pair: tuple[Tensor, Tensor], scale: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        left, right = F.relu(self.left(pair[0])), F.relu(self.right(pair[1]))
        joined = left * right if scale is None else left * right * scale
        return self.head(F.relu(self.hidden(joined))), {"left": left, "right": right}


@entry
def tuple_inputs() -> Entry:
    return TwoTowers(), ((torch.randn(2, 6), torch.randn(2, 4)),)


@entry
def keyword_inputs() -> Entry:
    return TwoTowers(), {"pair": (torch.randn(2, 6), torch.randn(2, 4)), "scale": torch.rand(2, 1)}


class Recommender(nn.Module):
    """Numbers and categories; every pair of their vectors is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 8) for size in (20, 30))
        self.bottom, self.top = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)), nn.Sequential(nn.Linear(17, 16), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
        numbers = self.bottom(numbers)
        vectors = torch.stack([numbers, *(table(kinds[:, place]) for place, table in enumerate(self.tables))], 1)
        pairs = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return self.head(self.top(torch.cat([numbers, pairs], 1)))  # type: ignore[no-any-return]


@entry
def recommender() -> Entry:
    return Recommender(), (torch.randn(2, 4), torch.randint(0, 20, (2, 2)))


class Points(nn.Module):
    """A cloud of points is turned by a matrix that a small network makes of it; the largest value of each channel counts."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.turn, self.rest = nn.Linear(16, 16 * 16), nn.Sequential(nn.Conv1d(16, 24, 1), nn.BatchNorm1d(24), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(24, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        matrix = self.turn(x.amax(2)).view(-1, 16, 16) + torch.eye(16)
        x = torch.bmm(x.transpose(1, 2), matrix).transpose(1, 2)
        return self.head(self.rest(x).max(2).values)  # type: ignore[no-any-return]


@entry
def pointnet() -> Entry:
    return Points(), torch.randn(2, 3, 10)


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
