"""Integers made for the entropy coder: each is as cheap to code as what it disturbs allows.

The objective is sum over layers of g E(q) + lambda * bits(q). E is the energy of rounding.py, the mean squared error of a layer's outputs;
g says what such an error does to the outputs of the network; bits are those that the context model of pack/symbols.py will need, as
estimated from the integers themselves. Rows [groups, rows, inputs] as in moments.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph, Layer, layers
from ..graph.fuse import channel
from ..graph.model import aten, read
from ..graph.watch import Watch
from ..task import Task, calibration
from .grid import SMALLEST_SCALE
from .insert import quantize_weight
from .integers import solved, stages
from .moments import TRANSPOSED, Moments, as_rows, from_rows, gather
from .rounding import inverse_factor

BITS = 8  # of the grid: no weight is clipped where steps are as coarse as here
_HIGH = (1 << BITS - 1) - 1
_RATIO = 0.03  # of lambda to the energy of one step, by measurement; 2 ln 2 / 12 where bits are many and others do not make up
_TRUST, _PRIOR = 16, 4.0  # symbols that a mean outweighs; weight of a geometric distribution among counts
_CLASSES = (-12, 8)  # half octaves of expected magnitude that are told apart
_LEAST = 0.05  # of a layer's mean sensitivity: no channel counts less
_BLOCK = 64
_TRIES, _CLOSE = 7, 0.01  # to meet the bits asked for; within a part of them


@dataclass
class Rows:
    """A layer to be coded: target weights and H as `solved` gives them, its sensitivity [groups, rows], positions in its kernel, and
    where weights are zero for good (of w's shape)."""

    w: Tensor
    H: Tensor
    gain: Tensor
    taps: int
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        self.order = self.H.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
        index = self.order
        H = self.H.gather(1, index[:, :, None].expand_as(self.H)).gather(2, index[:, None].expand_as(self.H))
        self.upper = inverse_factor(H)
        self.stiffness = float(torch.exp(-2 * self.upper.diagonal(dim1=1, dim2=2).log().mean()))  # of a weight, when others yield

    def step(self, multiplier: float) -> float:
        """The step size at which lambda and distortion are balanced: reverse water-filling, for all layers have one lambda."""
        wanted = math.sqrt(multiplier / (_RATIO * max(float(self.gain.mean()) * self.stiffness, 1e-300)))
        return max(wanted, float(self.w.abs().max()) / _HIGH, SMALLEST_SCALE)

    def choose(self, step: float, multiplier: float) -> tuple[Tensor, float]:
        """Integers, and the bits that they take."""
        q = torch.round(self.w / step).clamp(-_HIGH, _HIGH)
        price = multiplier / self.gain
        for _ in range(2):
            q = self._pass(step, price, *contexts(q, self.taps))
        where, table = contexts(q, self.taps)
        return q, float(table[where, q.abs().long()].double().sum())

    def _pass(self, step: float, price: Tensor, where: Tensor, table: Tensor) -> Tensor:
        """Every column in turn takes the cheapest of three integers; those after it make up for the error, as in GPTQ."""
        index = self.order[:, None].expand_as(self.w)
        w, where = self.w.gather(2, index).mT.contiguous(), where.gather(2, index).mT.contiguous()
        kept = None if self.zero is None else (~self.zero).gather(2, index).mT.to(w)
        q, flat, size = torch.empty_like(w), table.flatten(), table.shape[1]
        for start in range(0, w.shape[1], _BLOCK):
            stop = min(start + _BLOCK, w.shape[1])
            errors = torch.empty_like(w[:, start:stop])
            for j in range(start, stop):
                own, scale = w[:, j], self.upper[:, j, j, None]
                near = (own / step).round().clamp(-_HIGH, _HIGH)
                options = torch.stack([near, near - near.sign(), torch.zeros_like(near)])
                options = options if kept is None else options * kept[:, j]
                error = (own - step * options) / scale
                cost = error.square() + price * flat[where[:, j] * size + options.abs().long()]
                best = cost.argmin(0, keepdim=True)
                q[:, j] = options.gather(0, best)[0]
                errors[:, j - start] = error.gather(0, best)[0]
                w[:, j + 1 : stop].baddbmm_(self.upper[:, j, j + 1 : stop, None], errors[:, j - start, None], alpha=-1)
            w[:, stop:].baddbmm_(self.upper[:, start:stop, stop:].mT, errors, alpha=-1)
        return torch.empty_like(self.w).scatter(2, index, q.mT)


def contexts(q: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """The context of each integer [groups, rows, inputs], and the bits of a magnitude with its sign in each [contexts, magnitudes].

    As in the coder, a context is the expected magnitude: the mean, corrected by those of output channel, input channel and position.
    """
    magnitude = q.abs().reshape(*q.shape[:2], -1, taps)
    mean = magnitude.mean().clamp_min(1e-6)
    expected = mean.expand_as(magnitude)
    for dims in ((2, 3), (1, 3), (0, 1, 2)):
        count = math.prod(magnitude.shape[dim] for dim in dims)
        if count < magnitude.numel():
            expected = expected * ((magnitude.sum(dims, keepdim=True) / mean + _TRUST) / (count + _TRUST))
    low, high = _CLASSES
    where = (2 * expected.log2()).floor().clamp(low, high).long() - low
    counts = torch.zeros(high - low + 1, _HIGH + 1, dtype=q.dtype, device=q.device)
    counts.view(-1).index_add_(0, (where * (_HIGH + 1) + magnitude.long()).flatten(), torch.ones_like(q).flatten())
    typical = 2.0 ** ((torch.arange(low, high + 1, dtype=q.dtype, device=q.device) + 0.5) / 2)
    ratio = (typical / (1 + typical))[:, None]
    levels = torch.arange(_HIGH + 1, dtype=q.dtype, device=q.device)
    counts += _PRIOR * (1 - ratio) * ratio**levels
    bits = -torch.log2((counts / counts.sum(1, keepdim=True)).clamp_min(2.0**-40))
    bits[:, 1:] += 1
    return where.reshape(q.shape), bits


def sensitivities(graph: Graph, chosen: Sequence[Layer], task: Task, samples: int) -> dict[str, Tensor]:
    """By weight: what a squared error of 1 at each output channel does to the squares of the outputs of the network [channels].

    The Gauss-Newton diagonal, from gradients of randomly signed sums of outputs (Martens 2020, section 9; Hutchinson 1990).
    """
    found: dict[str, Tensor] = {}
    places = {layer.node: layer for layer in chosen}
    seen: list[tuple[Layer, Tensor]] = []
    outputs: list[Tensor] = []
    output = next(node for node in graph.fx.nodes if node.op == "output")
    random = torch.Generator().manual_seed(0)

    def note(node: fx.Node, value: Any) -> Any:
        if node is output:
            outputs.extend(leaf for leaf in value if isinstance(leaf, Tensor) and leaf.requires_grad)
            return None
        value = value if value.requires_grad else value.detach().requires_grad_()
        seen.append((places[node], value))
        return value

    for inputs in calibration(task, samples):
        seen.clear()
        outputs.clear()
        with torch.enable_grad():
            Watch(graph, [*places, output], note)(inputs)
            signs = [torch.randint(0, 2, value.shape, generator=random).mul_(2).sub_(1).to(value) for value in outputs]
            sums = [(value * sign).sum() / _size(value) for value, sign in zip(outputs, signs, strict=True)]
            if not sums:
                return {}
            gradients = torch.autograd.grad(torch.stack(sums).sum(), [value for _, value in seen], allow_unused=True)
        for (layer, value), gradient in zip(seen, gradients, strict=True):
            if gradient is not None:
                dims = [dim for dim in range(value.ndim) if dim != channel(layer.node) % value.ndim]
                found[layer.weight] = found.get(layer.weight, 0) + gradient.square().sum(dims).nan_to_num(0, 0, 0)
    return found


def _size(values: Tensor) -> Tensor:
    return values.detach().square().mean().sqrt().clamp_min(SMALLEST_SCALE)


def codable(layer: Layer) -> bool:
    """Whether what its weight meets can be seen."""
    return layer.kind in ("conv", "linear")


def code_layers(graph: Graph, original: Graph, names: Sequence[str], task: Task, samples: int, bits: float) -> dict[str, Any]:
    """Puts the weights of layers on even grids, one step for each, their integers chosen for `bits` of code for a weight on average.

    Layer after layer, so that each makes up for what those before it have lost. What is lost in mean and size of an output channel is
    given back where it costs nothing: in a normalization that follows, or a bias that there is.
    """
    twins = {layer.name: layer for layer in layers(original)}
    pairs = [(layer, twins[layer.name]) for layer in layers(graph) if layer.name in names]
    gains = sensitivities(original, [twin for _, twin in pairs], task, samples)
    uses = Counter(layer.weight for layer in layers(graph))
    centred = {layer.weight: uses[layer.weight] == 1 and _makes_up(layer) for layer, _ in pairs}

    def rows(layer: Layer, moments: Moments) -> Rows:
        weight = graph.tensor(layer.weight).detach()
        H, target = solved(moments, as_rows(weight, layer), centred[layer.weight])
        gain = gains.get(layer.weight, weight.new_ones(len(target))).to(H).reshape(len(target), -1)
        gain = gain.clamp_min(_LEAST * float(gain.mean()) + 1e-30).repeat_interleave(target.shape[1] // gain.shape[1], 1)
        taps = 1 if layer.kind == "linear" or layer.node.target in TRANSPOSED else math.prod(weight.shape[2:])
        return Rows(target, H, gain, taps, as_rows(weight == 0, layer) if layer.weight in graph.sparse else None)

    plain = gather(original, original, [(twin, twin) for _, twin in pairs], task, samples)
    multiplier = _multiplier([rows(layer, moments) for layer, moments in plain.items()], bits)
    del plain
    spent, size = 0.0, 0
    for stage in stages(pairs):
        for layer, moments in gather(graph, original, stage, task, samples).items():
            here = rows(layer, moments)
            step = here.step(multiplier)
            q, cost = here.choose(step, multiplier)
            step = _refit(here, q, step)
            weight = graph.tensor(layer.weight).detach()
            quantize_weight(graph, layer, BITS, step)
            new = from_rows(step * q, layer, weight).contiguous()
            if centred[layer.weight]:
                _give_back(graph, layer, moments, as_rows(weight, layer), as_rows(new, layer))
            graph.set_tensor(layer.weight, new)
            spent, size = spent + cost, size + q.numel()
    graph.recompile()
    return {"bits": spent / size, "multiplier": multiplier}


def _multiplier(parts: list[Rows], bits: float) -> float:
    """The lambda at which integers take `bits` each."""
    size = sum(part.w.numel() for part in parts)
    energies = [(part.w.numel(), float(part.gain.mean()) * part.stiffness * float(part.w.square().mean())) for part in parts]
    x = sum(count * math.log2(max(energy, 1e-300)) for count, energy in energies) / size - 2 * bits  # about right for Gaussian weights
    low, high = -math.inf, math.inf
    for _ in range(_TRIES):
        spent = sum(part.choose(part.step(2.0**x), 2.0**x)[1] for part in parts) / size
        if abs(spent / bits - 1) < _CLOSE:
            break
        low, high = (x, high) if spent > bits else (low, x)
        guess = x + 2 * (spent - bits) if spent > 1 else x + 2 * math.log2(max(spent, 1e-3) / bits)
        x = guess if low < guess < high else (low + high) / 2 if math.isfinite(low + high) else guess
    return math.exp2(x)


def _refit(rows: Rows, q: Tensor, step: float) -> float:
    """The step that suits the integers best, by least squares."""
    weight = rows.gain[..., None] * (q @ rows.H)
    squares, products = float((weight * q).sum()), float((weight * rows.w).sum())
    return products / squares if squares > 0 and products > 0 else step


def _norm(layer: Layer) -> fx.Node | None:
    """The batch normalization that alone reads the outputs of a layer."""
    users = list(layer.node.users)
    alone = len(users) == 1 and users[0].target is aten.batch_norm.default and users[0].args[0] is layer.node
    return users[0] if alone and not read(users[0], "training") else None


def _makes_up(layer: Layer) -> bool:
    return layer.kind in ("conv", "linear") and layer.node.target not in TRANSPOSED and (_norm(layer) is not None or layer.bias is not None)


def _give_back(graph: Graph, layer: Layer, moments: Moments, old: Tensor, new: Tensor) -> None:
    """Restores the mean of the outputs, and where a normalization follows also their size, by least squares."""
    H, cross = moments.matrices(True)
    first, first0 = (value[:, :, None] / moments.count for value in (moments.first, moments.first0))
    mean0, mean = (old @ first0).flatten(), (new @ first).flatten()
    norm = _norm(layer)
    if norm is None:
        graph.tensor(str(layer.bias)).data.add_(mean0 - mean)
        return
    square, product = ((new @ H) * new).sum(-1).flatten(), ((old @ cross) * new).sum(-1).flatten()
    factor = torch.where((square > 0) & (product > 0), product / square.clamp_min(1e-30), torch.ones_like(square)).clamp(0.5, 2.0)
    bias = graph.tensor(str(layer.bias)).data if layer.bias is not None else torch.zeros_like(mean)
    running = graph.tensor(str(read(norm, "running_mean").target)).data
    # The outputs were w x + b; now factor * (v x + b) + shift is what comes closest.
    shift = mean0 + bias - factor * (mean + bias)
    running.copy_((running - shift) / factor)
    if (scale := read(norm, "weight")) is not None:
        graph.tensor(str(scale.target)).data.mul_(factor)
    else:
        variance = graph.tensor(str(read(norm, "running_var").target)).data
        variance.div_(factor.square())
