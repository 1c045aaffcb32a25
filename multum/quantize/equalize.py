"""`Equalize`: scales of channels moved from what makes a value into what reads it, so that both are rounded well. Exact in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, Layer, layers, select
from ..graph.fuse import fuse, scaled, zero_pad
from ..graph.matrix import data, multiplies
from ..graph.model import aten, read, shape
from ..graph.watch import Watch
from ..step import Plan, Stage, Step, option
from ..task import Task, calibration
from .grid import SMALLEST_SCALE, quantize, signed
from .insert import following, weight_scale
from .moments import Moments, as_rows, gather

_SWEEPS = 20  # of "ranges" over all values: each moves what the next one meets
_PARTS = 20  # exponents that "awq" tries, evenly from 0 to 1
_MOST = 1e3  # times that a channel grows or shrinks at the most
_BELOW = 0.9  # of the bound of a clip: channels that stay below it are never clipped
# What multiplies its result when its input is multiplied, channel by channel.
_PASSES = (
    aten.relu.default, aten.leaky_relu.default, aten.dropout.default, aten.contiguous.default, aten.clone.default,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default,
)  # fmt: skip
_CLIPS = (aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
_LAST = (aten.layer_norm.default, aten.rms_norm.default)  # normalizations over the last dimension
METHODS = ("ranges", "smooth", "awq")


@dataclass(frozen=True)
class Equalize(Step):
    """Divides each channel of a value by a scale where it is made and multiplies the weights that read it: an equal network in float.

    `ranges`: weights before and after get equal ranges, no data needed (Nagel et al. 2019, "Data-free quantization", section 4.1);
    `smooth`: what is large in the activations goes into the weights (Xiao et al. 2023, "SmoothQuant", section 4); `awq`: weights that meet
    large activations are made large, by the power of them with which rounding to `bits` bits disturbs the outputs least (Lin et al. 2023,
    "AWQ", section 3.2). Normalizations are folded first. With `insert` a value that linear layers read and whose maker cannot give up a
    scale, such as one that is added to others as well, is multiplied on its way into them: an operator more. Behind a clip such as ReLU6,
    which no scale passes, only channels that stay below it on the calibration data are moved. Rounding comes after: quantize.Static.
    """

    stage: ClassVar[Stage | None] = Stage.VALUES

    method: str = option("ranges", f"how scales are chosen: {', '.join(METHODS)}")
    strength: float = option(0.5, "of smooth: the power of the activations that the weights take over, 0 to 1")
    bits: int = option(4, "of awq: bits that the weights will have, 2 to 8")
    insert: bool = option(False, "of smooth and awq: multiply what linear layers read where no layer can give up a scale")
    samples: int = option(128, "calibration samples that are looked at")
    include: str | tuple[str, ...] = option("*", "glob patterns of the layers that make the values")
    exclude: str | tuple[str, ...] = option((), "glob patterns of layers to leave as they are")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise StepError(f"quantize.Equalize: method is {self.method!r}.", f"one of {', '.join(METHODS)}")
        if not 0 <= self.strength <= 1 or not 2 <= self.bits <= 8 or self.samples < 1:
            given = f"strength is {self.strength}, bits {self.bits}, samples {self.samples}"
            raise StepError(f"quantize.Equalize: {given}.", "a strength of 0 to 1, 2 to 8 bits, at least 1 sample")

    def requires(self) -> tuple[str, ...]:
        return () if self.method == "ranges" else ("calibration",)

    def plan(self, graph: Graph, task: Task) -> Plan:
        graph = graph.copy()
        fuse(graph)
        found, skipped = self._passages(graph, task)
        return Plan({passage.name: {"readers": [layer.name for layer in passage.readers]} for passage in found}, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        fuse(graph)
        found, _ = self._passages(graph, task)
        seen = {layer.node: layer for passage in found for layer in passage.readers} if self.method == "awq" else {}
        moments = gather(graph, graph, [(layer, layer) for layer in seen.values()], task, self.samples) if seen else {}
        reach = _activations(graph, found, task, self.samples) if self.method != "ranges" or any(p.clips for p in found) else {}
        whole = {passage.name: torch.ones(passage.channels) for passage in found}
        choose: dict[str, Callable[[Passage], Tensor]] = {
            "ranges": lambda passage: _ranges(graph, passage),
            "smooth": lambda passage: _smooth(graph, passage, reach[data(passage.readers[0])][1], self.strength),
            "awq": lambda passage: _awq(graph, passage, reach[data(passage.readers[0])][0], self.bits, moments),
        }
        for _ in range(_SWEEPS if self.method == "ranges" else 1):
            for passage in found:
                name, already = passage.name, whole[passage.name]
                scale = choose[self.method](passage).nan_to_num(1, 1, 1).clamp(1 / _MOST, _MOST)
                for clip, bound in passage.clips:
                    most = reach[clip][1] / already
                    scale = torch.where(most * already < _BELOW * bound, torch.maximum(scale, most / (_BELOW * bound)), 1.0)
                passage.move(graph, scale)
                whole[name] = already * scale
        return {"scales": {name: [float(scale.min()), float(scale.max())] for name, scale in whole.items()}}

    def _passages(self, graph: Graph, task: Task) -> tuple[list[Passage], dict[str, str]]:
        chosen = {layer.name for layer in select(graph, self.include, self.exclude, ("conv", "linear", "norm"))}
        uses = Counter(str(node.target) for node in graph.fx.nodes if node.op == "get_attr" for _ in node.users)
        known = {layer.node: layer for layer in layers(graph)}
        found, skipped = list[Passage](), dict[str, str]()
        for layer in known.values():
            if layer.kind not in ("conv", "linear", "norm"):
                continue
            passage = Passage(layer)
            reason = "excluded by name" if layer.name not in chosen else _follow(layer.node, known, uses, passage)
            reason = reason or _unfit(layer, uses)
            if not reason and layer.kind == "norm" and self.method == "ranges":
                reason = "a normalization has no range that rounding would feel"
            if not reason and passage.clips and not task.has("calibration"):
                reason = "a clip follows, and there are no calibration data to tell which channels it leaves alone"
            if reason:
                skipped[layer.name] = reason
            else:
                found.append(passage)
        if self.insert and self.method != "ranges":
            found += _inserted(known.values(), found, uses)
        return found, skipped


@dataclass
class Passage:
    """A layer that makes a value, the layers that read it, and the clips between with their bounds. Without a maker the value itself is
    multiplied on its way into the readers."""

    maker: Layer | None
    readers: list[Layer] = field(default_factory=list)
    clips: list[tuple[fx.Node, float]] = field(default_factory=list)

    @property
    def dim(self) -> int:
        """The dimension of the maker's result in which its channels lie."""
        return -1 if self.maker is None or self.maker.kind == "linear" or self.maker.node.target in _LAST else 1

    @property
    def channels(self) -> int:
        return shape(data(self.readers[0]) if self.maker is None else self.maker.node)[self.dim]

    @property
    def name(self) -> str:
        return data(self.readers[0]).name if self.maker is None else self.maker.name

    def move(self, graph: Graph, scale: Tensor) -> None:
        """Divides the value by a scale [channels] where it is made and multiplies by it where it is read."""
        scale = scale.to(graph.tensor(self.readers[0].weight))
        if self.maker is None:
            value = data(self.readers[0])
            after = following(graph, value)
            graph.set_tensor(f"equalized.{value.name}", 1 / scale, parameter=False)
            product = graph.operator(aten.mul.Tensor, (value, graph.attribute(f"equalized.{value.name}", after)), value, after)
            for reader in self.readers:
                reader.node.replace_input_with(value, product)
            graph.recompile()
        else:
            weight = graph.tensor(self.maker.weight).detach()
            graph.set_tensor(self.maker.weight, weight / scale if self.maker.kind == "norm" else scaled(weight, 1 / scale, self.maker))
            if self.maker.bias is not None:
                graph.set_tensor(self.maker.bias, graph.tensor(self.maker.bias).detach() / scale)
        for reader in self.readers:
            graph.set_tensor(reader.weight, read_scaled(graph.tensor(reader.weight).detach(), scale, reader))


def _inserted(known: Iterable[Layer], found: list[Passage], uses: Counter[str]) -> list[Passage]:
    """The values that linear layers read whose makers cannot give up a scale, unless their weights cannot take one."""
    done = {reader.node for passage in found for reader in passage.readers}
    values: dict[fx.Node, Passage] = {}
    for layer in known:
        if layer.kind == "linear" and layer.node not in done and data(layer).op != "get_attr":
            values.setdefault(data(layer), Passage(None)).readers.append(layer)
    return [passage for passage in values.values() if not any(_misfit(reader, passage, uses) for reader in passage.readers)]


def read_scaled(weight: Tensor, scale: Tensor, layer: Layer) -> Tensor:
    """The weight of a layer that reads channel i with what multiplies it times `scale[i]` [channels], groups included."""
    if layer.kind == "linear":
        return weight * scale.reshape([-1 if dim == 1 - layer.axis else 1 for dim in range(weight.ndim)])
    groups = int(read(layer.node, "groups", 1))
    split = weight.reshape(groups, -1, *weight.shape[1:])
    return (split * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)


def _follow(node: fx.Node, known: dict[fx.Node, Layer], uses: Counter[str], passage: Passage) -> str:
    """Collects the readers of what a node makes; the reason why no scale can pass to all of them, or nothing."""
    for user in node.users:
        if (layer := known.get(user)) is not None and layer.kind in ("conv", "linear"):
            reason = "the network's inputs" if data(layer) is not node else _misfit(layer, passage, uses)
            if reason:
                return f"{layer.name} reads it: {reason}"
            passage.readers.append(layer)
        elif user.target in _CLIPS and (bound := _bound(user)):
            passage.clips.append((user, bound))
            if reason := _follow(user, known, uses, passage):
                return reason
        elif user.target in _PASSES or zero_pad(user) is not None or _pools(user):
            if reason := _follow(user, known, uses, passage):
                return reason
        else:
            return f"{user.name} lets no scale pass" if user.op != "output" else "it is an output"
    return "" if passage.readers else "no layer reads it"


def _misfit(layer: Layer, passage: Passage, uses: Counter[str]) -> str:
    """Why the weight of a reader cannot take up the scale, or nothing."""
    if not multiplies(layer):
        return "its weight is not one of rows and columns"
    dims = (passage.dim % len(shape(data(layer))), (-1 if layer.kind == "linear" else 1) % len(shape(data(layer))))
    if dims[0] != dims[1]:
        return "it reads channels in another dimension"
    return "its weight has other uses, or is quantized" if uses[layer.weight] > 1 or layer.quantizer() is not None else ""


def _unfit(layer: Layer, uses: Counter[str]) -> str:
    """Why a layer cannot give up a scale, or nothing."""
    shared = uses[layer.weight] > 1 or (layer.bias is not None and uses[layer.bias] > 1)
    return "its weight or bias has other uses, or is quantized" if shared or layer.quantizer() is not None else ""


def _bound(node: fx.Node) -> float:
    """Where a function from zero up clips; 0.0 for any other."""
    if node.target is aten.relu6.default:
        return 6.0
    low, high = (read(node, name) for name in (("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")))
    return float(high) if low == 0 and isinstance(high, int | float) else 0.0


def _pools(node: fx.Node) -> bool:
    """Whether a node takes means over places, or drops dimensions without any: channels stay where they are."""
    before = node.all_input_nodes[0].meta["val"] if len(node.all_input_nodes) == 1 else None
    if not isinstance(before, Tensor) or before.ndim < 3:
        return False
    if node.target is aten.mean.dim:
        return 1 not in [dim % before.ndim for dim in read(node, "dim")] and 0 not in read(node, "dim")
    flattens = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)
    return node.target in flattens and before.shape[2:].numel() == 1 and shape(node)[1:] == (before.shape[1],)


def _activations(graph: Graph, passages: list[Passage], task: Task, samples: int) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """The mean and the largest magnitude of each channel of what readers read and clips make [channels]."""
    dims = {data(passage.readers[0]): -1 if passage.readers[0].kind == "linear" else 1 for passage in passages}
    dims |= {clip: passage.dim for passage in passages for clip, _ in passage.clips}
    found: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    turns = 0

    def see(node: fx.Node, value: Tensor) -> None:
        others = [dim for dim in range(value.ndim) if dim != dims[node] % value.ndim]
        mean, most = value.abs().mean(others), value.abs().amax(others)
        before = found.get(node, (torch.zeros_like(mean), torch.zeros_like(most)))
        found[node] = before[0] + (mean - before[0]) / turns, torch.maximum(before[1], most)

    watch = Watch(graph, dims, see)
    with torch.inference_mode():
        for turns, inputs in enumerate(calibration(task, samples), 1):  # noqa: B007
            watch(inputs)
    return {node: (mean.clone(), most.clone()) for node, (mean, most) in found.items()}


def _columns(graph: Graph, passage: Passage) -> Tensor:
    """The largest magnitude of the weights that meet each channel, over all readers [channels]."""
    found = torch.zeros(passage.channels)
    for reader in passage.readers:
        weight = graph.tensor(reader.weight).detach().abs().cpu()
        if reader.kind == "linear":
            own = weight.amax(reader.axis)
        else:
            groups = int(read(reader.node, "groups", 1))
            own = weight.flatten(2).amax(2).reshape(groups, -1, weight.shape[1]).amax(1).flatten()
        found = torch.maximum(found, own)
    return found.clamp_min(SMALLEST_SCALE)


def _ranges(graph: Graph, passage: Passage) -> Tensor:
    """What makes the largest weight that makes a channel as large as the largest that reads it."""
    maker, columns = passage.maker, _columns(graph, passage)
    assert maker is not None
    weight = graph.tensor(maker.weight).detach().abs().cpu()
    made = as_rows(weight, maker).amax(-1).flatten() if multiplies(maker) else weight.movedim(maker.axis, 0).flatten(1).amax(1)
    if made.numel() != columns.numel():  # groups of a transposed convolution
        return torch.ones_like(columns)
    return torch.sqrt(made.clamp_min(SMALLEST_SCALE) / columns)


def _smooth(graph: Graph, passage: Passage, largest: Tensor, strength: float) -> Tensor:
    scale = largest.cpu().clamp_min(1e-5) ** strength / _columns(graph, passage) ** (1 - strength)
    return scale / scale.log().mean().exp()


def _awq(graph: Graph, passage: Passage, mean: Tensor, bits: int, moments: dict[Layer, Moments]) -> Tensor:
    """The power of the mean magnitudes whose scales make rounding to nearest disturb the readers' outputs least."""
    mean, best, least = mean.clamp_min(1e-4 * float(mean.max()) + 1e-12), torch.ones_like(mean), float("inf")
    for part in torch.linspace(0, 1, _PARTS + 1)[:-1].tolist():
        scale = mean**part
        scale = scale / (scale.max() * scale.min()).sqrt()
        total = 0.0
        for reader, seen in ((reader, moments[reader]) for reader in passage.readers):
            weight, grid = graph.tensor(reader.weight).detach(), signed(bits, reader.axis)
            moved = read_scaled(weight, scale, reader)
            step = weight_scale(moved, grid)
            error = read_scaled(quantize(moved, step, torch.zeros_like(step), grid), 1 / scale, reader) - weight
            rows = as_rows(error, reader)
            total += float(((rows @ seen.second) * rows).sum() / seen.count)
        if total < least:
            best, least = scale, total
    return best.cpu()
