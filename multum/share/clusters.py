"""Weights that share a few values, or vectors a few vectors: codebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..analyze.evidence import Evidence
from ..errors import StepError
from ..graph import Graph, Layer, layers
from ..step import Plan, Stage, Step, option
from ..task import Task
from ..train import Training, recover
from .codebook import planned, read_from
from .kmeans import STARTS, assign, bits_of, kmeans
from .soft import Soft

_SCOPES, _WEIGHTINGS = ("layer", "channel", "model"), ("auto", "none", "curvature", "fisher")
_FLOOR = 0.05  # of the mean weight: what no sample needed still counts
_ROUNDS, _ENOUGH = 16, 0.01  # of the search for the price of a bit; how far below the bits asked for is close enough
_PROBE = 1 << 16  # vectors of a codebook that are looked at in that search


_Book = tuple[Tensor, Tensor, bool]  # vectors [groups, n, size], what their errors count, and whether zeros stay


@dataclass
class _Shelf:
    """The codebooks of a graph: the layers of each, and by weight what errors count [groups, n, size], and its scale if it has one."""

    graph: Graph
    size: int
    scope: str
    members: dict[str, list[Layer]] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor | None] = field(default_factory=dict)

    def grouped(self, layer: Layer, value: Tensor) -> Tensor:
        return _grouped(layer, value, self.size) if self.scope == "channel" else value.reshape(1, -1, self.size)

    def book(self, name: str) -> _Book:
        """What the codebook is made for, as the weights are now."""
        vectors = list[Tensor]()
        for layer in self.members[name]:
            weight, scale = self.graph.tensor(layer.weight).detach().float(), self.scales[layer.weight]
            vectors.append(self.grouped(layer, weight if scale is None else weight / scale))
        counted = [self.counts[layer.weight] for layer in self.members[name]]
        return torch.cat(vectors, 1), torch.cat(counted, 1), any(layer.weight in self.graph.sparse for layer in self.members[name])


@dataclass(frozen=True)
class Clusters(Step):
    """Replaces each weight by the nearest entry of a codebook of 2^`bits` (Han, Mao & Dally 2016, "Deep compression", section 3).

    With `size` above 1 vectors of so many weights that lie in a row of the matrix share an entry (product quantization; Gong et al. 2014;
    Stock et al. 2020). The indices never change again: training that follows moves the entries. In a file the indices are entropy coded;
    `entropy` bounds what they take there, and entries are then chosen by error plus a price for the bits of their index. Zeros that
    pruning set stay zero. With `epochs` the network trains toward the original before the indices are settled, and weights choose their
    entry while it does, see `soft.py`.
    """

    stage: ClassVar[Stage | None] = Stage.NUMBERS

    bits: int = option(4, "of an index, 1 to 8: a codebook has 2, 4 ... 256 entries")
    size: int = option(1, "weights in an entry; more than 1: product quantization")
    scope: str = option("layer", "what has a codebook of its own: layer, channel (of an embedding: columns) or model")
    start: str = option("kmeans++", f"where entries begin: {', '.join(STARTS)}; the last two for size 1")
    weighting: str = option("auto", "what errors count: none, curvature (of data), fisher (of training data); auto: curvature if it can")
    entropy: float | None = option(None, "most bits per index that the indices may take on average, when they are entropy coded")
    samples: int = option(256, "that weighting looks at")
    epochs: float = option(0.0, "passes over the training data in which weights choose their entries softly; 0: nearest entries at once")
    learning_rate: float | None = option(None, "highest one of that training; found from the graph when not given")
    include: str | tuple[str, ...] = option("*", "glob patterns of layers")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave as they are")

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise StepError(f"share.Clusters: bits is {self.bits}.", "1 to 8 bits")
        if self.size < 1:
            raise StepError(f"share.Clusters: size is {self.size}.", "at least 1")
        for name, known in (("scope", _SCOPES), ("start", STARTS), ("weighting", _WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise StepError(f"share.Clusters: {name} is {getattr(self, name)!r}.", f"one of {', '.join(known)}")
        if self.size > 1 and self.start != "kmeans++":
            raise StepError(f"share.Clusters: start is {self.start!r} and size {self.size}.", "kmeans++: vectors have no order")
        if self.entropy is not None and not 0 < self.entropy < self.bits:
            raise StepError(f"share.Clusters: entropy is {self.entropy} of {self.bits} bits.", "more than 0 and less than bits")
        if self.epochs < 0:
            raise StepError(f"share.Clusters: epochs is {self.epochs}.", "0 or more")

    def requires(self) -> tuple[str, ...]:
        weighting = {"fisher": ("train", "loss"), "curvature": ("calibration",)}.get(self.weighting, ())
        return tuple(dict.fromkeys((*weighting, *(("train",) if self.epochs else ()))))

    def plan(self, graph: Graph, task: Task) -> Plan:
        def change(layer: Layer) -> dict[str, Any]:
            return {"entries": 2**self.bits, "size": self.size, "indices": graph.tensor(layer.weight).numel() // self.size}

        return planned(graph, self.include, self.exclude, lambda layer: self._reason(graph, layer), change)

    def _reason(self, graph: Graph, layer: Layer) -> str | None:
        """Why a layer keeps its weight as it is; None when it does not."""
        weight = graph.tensor(layer.weight)
        if layer.quantizer() is not None:
            return "its weight is quantized"
        if not weight.is_floating_point() or not torch.isfinite(weight).all():
            return "its weight holds NaN, infinite values or no floating-point numbers"
        if weight.ndim < 2 or weight[0].numel() % self.size:
            return f"its rows of {weight[0].numel()} weights do not divide into vectors of {self.size}"
        books = _grouped(layer, weight, self.size).shape[0] if self.scope == "channel" else self.scope == "layer"
        if weight.numel() // self.size * self.bits / 32 + books * 2**self.bits * self.size >= weight.numel():
            return "indices and codebook would take as much"
        return None

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        shelf = self._shelf(graph, plan, task)
        books = {name: shelf.book(name) for name in shelf.members}
        price = self._price(books, task.seed) if self.entropy else 0.0
        learned = {name: self._learned(*book, price, task.seed) for name, book in books.items()}
        trained = self._choose_softly(shelf, books, learned, price, task, workdir) if self.epochs and books else {}
        total = 0.0
        for name, (index, codebook) in learned.items():
            codebook, near, index = _ordered(codebook, index)
            total += float(bits_of(index, codebook.shape[1]).gather(1, index).sum())
            layers_of = shelf.members[name]
            graph.set_tensor(name, codebook.reshape(-1, self.size).to(graph.tensor(layers_of[0].weight).dtype), parameter=True)
            if books[name][2]:
                graph.sparse |= {name}
            parts = torch.split(index, [shelf.counts[layer.weight].shape[1] for layer in layers_of], 1)
            for layer, part in zip(layers_of, parts, strict=True):
                self._put(graph, layer, part - near[:, None], near, name, shelf.scales[layer.weight])
        count = sum(vectors.shape[0] * vectors.shape[1] for vectors, _, _ in books.values())
        return {"bits": total / count / self.size, "price": price} | trained

    def _shelf(self, graph: Graph, plan: Plan, task: Task) -> _Shelf:
        own = [layer for layer in layers(graph) if "entries" in plan.changes.get(layer.name, ())]
        importance = self._importance(graph, task) if any(layer.kind != "embedding" for layer in own) else {}
        shelf = _Shelf(graph, self.size, self.scope)
        for layer in own:
            weight = graph.tensor(layer.weight)
            scale = shelf.scales[layer.weight] = _root(weight) if self.scope == "model" else None
            shelf.members.setdefault("codebook" if self.scope == "model" else f"{layer.weight}_codebook", []).append(layer)
            counted = importance.get(layer.weight) if layer.kind != "embedding" else None
            counted = shelf.grouped(layer, torch.ones_like(weight, dtype=torch.float32) if counted is None else counted)
            shelf.counts[layer.weight] = counted if scale is None else counted * scale.square()
        return shelf

    def _choose_softly(
        self, shelf: _Shelf, books: Mapping[str, _Book], learned: dict[str, tuple[Tensor, Tensor]], price: float, task: Task,
        workdir: Path | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Trains the graph on the shelf, whose weights read what was learned softly, and puts into `learned` what they chose."""
        soft, trained = Soft(), shelf.graph.copy()
        for name, (index, codebook) in learned.items():
            vectors, counted, zero = books[name]
            penalty = price * bits_of(index, codebook.shape[1])
            lost = float(assign(vectors, counted, codebook, torch.zeros_like(penalty))[1].mean())
            trained.set_tensor(
                name, codebook.reshape(-1, self.size).to(trained.tensor(shelf.members[name][0].weight).dtype), parameter=True
            )
            if zero:  # the entry that is zero stays so
                trained.sparse |= {name}
            for layer in shelf.members[name]:
                across = self.scope == "channel" and layer.kind == "embedding"
                soft.read(trained, layer.weight, shelf.counts[layer.weight], name, penalty, lost, across, shelf.scales[layer.weight], zero)
        how = Training.of(trained.requires_grad_(True), self.learning_rate, epochs=self.epochs, patience=0)
        measured = recover(trained, task, how, workdir, (soft,))
        for name, _ in list(shelf.graph.named_tensors()):
            shelf.graph.set_tensor(name, trained.tensor(name).detach())
        for weight, scale in shelf.scales.items():
            shelf.scales[weight] = scale if scale is None else trained.tensor(f"{weight}_scale").detach()
        for name, (_, codebook) in learned.items():
            codebook = trained.tensor(name).detach().reshape(codebook.shape)
            learned[name] = self._assigned(*shelf.book(name), codebook, price), codebook
        return measured

    def _put(self, graph: Graph, layer: Layer, index: Tensor, near: Tensor, book: str, scale: Tensor | None) -> None:
        """The weight of the layer reads these indices [groups, n], counted from the entries `near` zero [groups]."""
        weight = graph.tensor(layer.weight)
        form = weight.shape if self.size == 1 else (weight.shape[0], -1)
        if self.scope != "channel":
            read_from(graph, layer.weight, _small(index.reshape(form)), book, int(near[0]), scale)
            return
        offset = (torch.arange(len(near), device=near.device) * 2**self.bits + near).int()
        across = layer.kind == "embedding"
        index = (index.T if across else index).reshape(form)
        read_from(graph, layer.weight, _small(index), book, offset[None] if across else offset.reshape(-1, *[1] * (index.ndim - 1)), scale)

    def _importance(self, graph: Graph, task: Task) -> Mapping[str, Tensor]:
        """What a squared error of each weight counts, one on average; nothing when all count the same."""
        has_data = task.calibration is not None or task.train is not None
        if self.weighting == "none" or (self.weighting == "auto" and not has_data):
            return {}
        evidence = Evidence(graph, task, self.samples)
        found = evidence.squares if self.weighting == "fisher" else evidence.curvature
        mean = sum(float(value.sum()) for value in found.values()) / max(1, sum(value.numel() for value in found.values()))
        return {name: value / max(mean, 1e-30) + _FLOOR * (value.mean() / max(mean, 1e-30)) + 1e-6 for name, value in found.items()}

    def _learned(self, vectors: Tensor, counted: Tensor, zero: bool, price: float, seed: int) -> tuple[Tensor, Tensor]:
        codebook = kmeans(vectors, counted, 2**self.bits, self.start, price, seed, zero)
        return self._assigned(vectors, counted, zero, codebook, price), codebook

    def _assigned(self, vectors: Tensor, counted: Tensor, zero: bool, codebook: Tensor, price: float) -> Tensor:
        penalty = codebook.new_zeros(codebook.shape[:2])
        index, _ = assign(vectors, counted, codebook, penalty)
        for _ in range(3 if price else 0):
            index, _ = assign(vectors, counted, codebook, price * bits_of(index, codebook.shape[1]))
        if zero:  # what is zero stays so, whatever it costs
            none = (codebook.square().sum(2) == 0).float().argmax(1, keepdim=True)
            index = torch.where((vectors == 0).all(2), none, index)
        return index

    def _price(self, joined: Mapping[str, _Book], seed: int) -> float:
        """The price of a bit, one for all codebooks, at which the indices take the bits that are asked for."""
        assert self.entropy is not None
        probes = {}
        for name, (vectors, counted, zero) in joined.items():
            step = -(-vectors.shape[1] // _PROBE)
            probes[name] = vectors[:, ::step], counted[:, ::step], zero

        def bits(price: float) -> float:
            found = total = 0.0
            for name, (vectors, counted, zero) in probes.items():
                index, codebook = self._learned(vectors, counted, zero, price, seed)
                whole = joined[name][0]
                found += float(bits_of(index, codebook.shape[1]).gather(1, index).mean()) * whole.shape[0] * whole.shape[1]
                total += whole.shape[0] * whole.shape[1]
            return found / total

        mean = sum(float((c * v * v).sum()) for v, c, _ in probes.values()) / sum(v.shape[0] * v.shape[1] for v, _, _ in probes.values())
        low, high = 1e-7 * mean, 10 * mean
        if bits(0.0) <= self.entropy:
            return 0.0
        for _ in range(_ROUNDS):
            middle = math.sqrt(low * high)
            found = bits(middle)
            low, high = (middle, high) if found > self.entropy else (low, middle)
            if 0 <= self.entropy - found < _ENOUGH * self.entropy:
                return middle
        return high


def _grouped(layer: Layer, value: Tensor, size: int) -> Tensor:
    """A weight, or something of its shape, as vectors by channel [channels, n, size]; of an embedding, by columns [columns, rows, size]."""
    rows = value.reshape(value.shape[0], -1, size)
    return rows.transpose(0, 1) if layer.kind == "embedding" else rows


def _ordered(codebook: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with single numbers in ascending order, vectors by their length; and the place of the one nearest to zero [groups]."""
    lengths = codebook.square().sum(2)
    order = (codebook[..., 0] if codebook.shape[2] == 1 else lengths).argsort(dim=1, stable=True)
    place = order.argsort(1)
    ordered = codebook.gather(1, order[..., None].expand_as(codebook))
    near = ordered.square().sum(2).argmin(1)
    return ordered, near, place.gather(1, index)


def _small(index: Tensor) -> Tensor:
    """In the smallest type of integers that holds them."""
    low, high = int(index.min()), int(index.max())
    return index.to(next(t for t in (torch.int8, torch.uint8, torch.int16) if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max))


def _root(value: Tensor) -> Tensor:
    """The root mean square [1], never zero."""
    return value.detach().float().square().mean().sqrt().clamp_min(1e-12).reshape(1)
