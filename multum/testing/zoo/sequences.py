"""Sounds and texts: convolutions along time, embeddings, recurrent layers and cells, a conditional random field."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .entry import Entry, entry
from .images import conv


@entry
def conv1d() -> Entry:
    body = (nn.Conv1d(4, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ELU(), nn.Conv1d(8, 16, 3, padding="same"), nn.GroupNorm(4, 16), nn.GELU())
    return nn.Sequential(*body, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 5)), torch.randn(2, 4, 20)


class Wave(nn.Module):
    """Gated dilated convolutions along time under weight norm, each with a residual and a skip output; only the past is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = nn.Conv1d(1, 12, 1), nn.Conv1d(8, 5, 1)
        self.dilated = nn.ModuleList(weight_norm(nn.Conv1d(12, 2 * 16, 2, dilation=2**place)) for place in range(3))
        self.out = nn.ModuleList(nn.Conv1d(16, 12 + 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.start(x), []
        for place, (dilated, out) in enumerate(zip(self.dilated, self.out, strict=True)):
            filtered, gate = dilated(F.pad(x, (2**place, 0))).chunk(2, 1)
            residual, skip = out(torch.tanh(filtered) * torch.sigmoid(gate)).split([12, 8], 1)
            x = x + residual
            skips.append(skip)
        return self.end(F.relu(torch.stack(skips).sum(0)))  # type: ignore[no-any-return]


@entry
def wavenet() -> Entry:
    return Wave(), torch.randn(2, 1, 12)


class TextConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 12), nn.Linear(24, 5)
        self.convolutions = nn.ModuleList(nn.Conv1d(12, 8, size) for size in (2, 3, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        return self.head(torch.cat([F.relu(convolution(x)).amax(2) for convolution in self.convolutions], 1))  # type: ignore[no-any-return]


@entry
def text_cnn() -> Entry:
    return TextConvolutions(), torch.randint(0, 50, (2, 9))


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


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN], both: bool, projection: int = 0):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        options = {"proj_size": projection} if projection else {}
        self.rnn = cell(8, 12, num_layers=1 if both else 2, batch_first=True, bidirectional=both, **options)
        self.head = nn.Linear((projection or 12) * (2 if both else 1), 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(tokens))
        return self.head(states[:, -1])  # type: ignore[no-any-return]


@entry
def lstm() -> Entry:
    return Recurrent(nn.LSTM, both=False), torch.randint(0, 50, (2, 7))


@entry
def lstm_projection() -> Entry:
    return Recurrent(nn.LSTM, both=False, projection=6), torch.randint(0, 50, (2, 7))


@entry
def bidirectional_gru() -> Entry:
    return Recurrent(nn.GRU, both=True), torch.randint(0, 50, (2, 7))


@entry
def rnn() -> Entry:
    return Recurrent(nn.RNN, both=True), torch.randint(0, 50, (2, 7))


class Cells(nn.Module):
    """An LSTM and a GRU cell, unrolled, the first written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.before, self.second = nn.Linear(6, 4 * 8), nn.Linear(8, 4 * 8, bias=False), nn.GRUCell(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], 8)
        second = x.new_zeros(x.shape[0], 12)
        for step in range(x.shape[1]):
            i, f, g, o = (self.given(x[:, step]) + self.before(hidden)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            second = self.second(hidden, second)
        return self.head(second)  # type: ignore[no-any-return]


@entry
def recurrent_cells() -> Entry:
    return Cells(), torch.randn(2, 3, 6)


class RandomField(nn.Module):
    """Tags of words: scores from a two-way LSTM, and the sum over all paths through the tags, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(50, 12), nn.LSTM(12, 8, batch_first=True, bidirectional=True)
        self.hidden, self.tags, self.moves = nn.Linear(16, 12), nn.Linear(12, 5), nn.Parameter(torch.randn(5, 5))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.rnn(self.embedding(tokens))
        batch, length, _ = states.shape
        scores = self.tags(torch.tanh(self.hidden(states.reshape(batch * length, -1)))).view(batch, length, 5)
        paths = scores[:, 0]
        for step in range(1, length):
            paths = torch.logsumexp(paths[:, :, None] + self.moves + scores[:, step, None], 1)
        return scores, torch.logsumexp(paths, 1)


@entry
def bilstm_crf() -> Entry:
    return RandomField(), torch.randint(0, 50, (2, 5))


class Reader(nn.Module):
    """Text in pictures: what convolutions find, column after column, goes through a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.narrow = nn.Sequential(conv(1, 8, 3, 2), conv(8, 12, 3, 2)), nn.Linear(12 * 3, 16)
        self.read, self.head = nn.GRU(16, 10, batch_first=True, bidirectional=True), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.look(x)
        n, c, h, w = x.shape
        columns = x.permute(0, 3, 1, 2).reshape(n, w, c * h)
        return self.head(self.read(F.relu(self.narrow(columns)))[0]).log_softmax(-1)  # type: ignore[no-any-return]


@entry
def text_reader() -> Entry:
    return Reader(), torch.randn(2, 1, 12, 16)
