"""What the methods share: which layers may be factorized, their ranks, and the chains that take their places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..errors import StepError
from ..graph import Graph, Layer, layers, select
from ..graph.matrix import data, irreplaceable
from ..graph.model import read, shape
from ..prune.recover import replaced
from ..step import Plan, Stage, Step, option
from ..task import Task
from . import chain, vbmf
from .chain import Link
from .given import Given
from .ranks import Curve, by_budget, by_energy
from .sensitivity import by_outputs
from .timing import Clock, settled

Back = Callable[[list[Link]], list[Link]]
_BUDGETS = ("macs", "parameters", "latency")


@dataclass(frozen=True)
class Factorization(Step):
    """A layer becomes a chain of layers, where that costs less; ranks by the energy that is kept, or by one budget over all layers.

    A method says which layers it takes (`kinds`, `reason`), what they lose and cost at each rank (`curve`), and what the chain is
    (`links`). With calibration data the energy is that of the layer's outputs on them, else that of its weights. Weights are given as
    [outputs, inputs, ...], tables of embeddings as [width, rows], in double precision. With `recover` every layer is then factorized anew,
    in order: as the best for what it gave, on what those before it make by now (Zhang et al. 2015, section 3.3).
    """

    stage: ClassVar[Stage | None] = Stage.STRUCTURE
    kinds: ClassVar[Sequence[str]] = ("conv",)
    composes: ClassVar[bool] = True  # whether a chain comes to one weight, chosen by what data say

    energy: float = option(0.9, "share of each layer's energy that is kept")
    rank: int | tuple[int, ...] | str | None = option(None, "of every layer, a number for each of its ranks, or vbmf: what is not noise")
    macs: float | None = option(None, "share of the layers' multiply-accumulates to keep, over all at once; takes the place of energy")
    parameters: float | None = option(None, "the same for their parameters")
    latency: float | None = option(None, "the same for their times, each measured in ONNX Runtime on this machine")
    loss: str = option("energy", "what a budget keeps: energy of each layer, or outputs: those of the network, measured layer by layer")
    weighting: str = option("inputs", "what an error counts: inputs, as they are met; outputs: as well what it costs the network's outputs")
    faster: bool = option(False, "factorize only where the chain measures faster than the layer")
    samples: int = option(256, "calibration samples, where there are any, whose outputs are kept; 0: look at the weights alone")
    recover: bool = option(True, "each chain makes good what those before it lost, when there are calibration data")
    include: str | tuple[str, ...] = option("*", "layers that may be factorized, as glob patterns")
    exclude: str | tuple[str, ...] = option((), "layers that may not")

    def __post_init__(self) -> None:
        for name in ("energy", *_BUDGETS):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise StepError(f"{self.name()}: {name} is {share}.", "a share between 0 and 1, such as 0.5")
        given = [name for name in ("rank", *_BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise StepError(f"{self.name()}: {' and '.join(given)} are both given.", "one budget, or ranks")
        if isinstance(self.rank, str) and self.rank != "vbmf":
            raise StepError(f"{self.name()}: rank is {self.rank!r}.", "a number, or vbmf")
        if not isinstance(self.rank, str | None) and min(several(self.rank), default=0) < 1:
            raise StepError(f"{self.name()}: rank is {self.rank}.", "a rank of at least 1")
        for name, known in (("loss", "energy"), ("weighting", "inputs")):
            if getattr(self, name) not in (known, "outputs"):
                raise StepError(f"{self.name()}: {name} is {getattr(self, name)!r}.", f"{known} or outputs")
        if self.samples < 0:
            raise StepError(f"{self.name()}: samples is {self.samples}.", "0 or more")

    def requires(self) -> tuple[str, ...]:
        return ("calibration",) if "outputs" in (self.loss, self.weighting) else ()

    def reason(self, graph: Graph, layer: Layer) -> str | None:
        """Why a layer is not for this method, beside the reasons that all have."""
        return None

    def curve(self, layer: Layer, weight: Tensor, second: Tensor | None, macs: bool) -> Curve:
        """Of a weight and the second moments of its columns [height, height], of a table [rows]; costs are parameters or MACs."""
        raise NotImplementedError

    def unfoldings(self, layer: Layer, weight: Tensor) -> list[Tensor]:
        """A matrix for each rank, whose rank that is."""
        raise NotImplementedError

    def apparent(self, layer: Layer, weight: Tensor) -> list[int]:
        """The ranks that stand out of noise, at least one."""
        return [max(1, vbmf.rank(matrix)) for matrix in self.unfoldings(layer, weight)]

    def links(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int]) -> list[Link]:
        """The chain of these ranks."""
        raise NotImplementedError

    def dense(self, layer: Layer, weight: Tensor, second: Tensor | None, ranks: Sequence[int], back: Back = list) -> Tensor:
        """The weight to which that chain comes, when `back` has seen to it."""
        return chain.composed(back(self.links(layer, weight, second, ranks)), weight.shape)

    def put(self, graph: Graph, layer: Layer, links: list[Link]) -> None:
        """The chain takes the layer's place."""
        value = layer.node.args[1] if layer.kind == "embedding" else data(layer)
        bias = next((node for node in layer.node.all_input_nodes if node.target == layer.bias), None) if layer.bias else None
        assert isinstance(value, fx.Node)
        chain.replace(graph, layer, value, bias, links)

    def plan(self, graph: Graph, task: Task) -> Plan:
        chosen, skipped = self._chosen(graph)
        given, curves = self._given(graph, task, chosen), dict[str, Curve]()
        by_macs = self.macs is not None or self.latency is not None
        for name, layer in chosen.items():
            curves[name] = self.curve(layer, *given(layer), by_macs)
            if not len(curves[name].ranks):
                skipped[name] = curves.pop(name).note
        energies = {name: curve.lost for name, curve in curves.items()}
        if self.loss == "outputs" and self._budget():

            def dense(layer: Layer, ranks: Sequence[int]) -> Tensor:
                return self.dense(layer, *given(layer), ranks, partial(given.back, layer))

            curves = by_outputs(graph, task, curves, chosen, dense)
        clocks = {}
        if self.latency is not None or self.faster:
            clocks = {name: Clock(graph, chosen[name], partial(self._sketch, given.plain(chosen[name]), chosen[name])) for name in curves}
        for name in [name for name, clock in clocks.items() if not clock.known]:
            skipped[name] = "its time is not measured"
            del curves[name], clocks[name]
        if self.latency is not None:
            curves = {name: clocks[name].curve(curve) for name, curve in curves.items()}

        def choose(now: Mapping[str, Curve]) -> dict[str, int]:
            return self._choices(now, {name: given.plain(chosen[name]) for name in now if self.rank == "vbmf"}, chosen)

        found, curves, times = settled(choose, curves, clocks, self._budget() or "")
        changes = dict[str, dict[str, Any]]()
        for name, curve in curves.items():
            if (reason := self._kept(curve, found.get(name), times.get(name))) is not None:
                skipped[name] = reason
                continue
            changes[name] = {"rank": _brief(curve.rank(found[name])), "of": _brief(curve.of)}
            changes[name] |= {"energy": 1 - float(energies[name][found[name]]), **self._costs(curve, found[name])}
            changes[name] |= {"outputs": float(curve.lost[found[name]])} if self.loss == "outputs" and self._budget() else {}
            changes[name] |= {"ms": list(times[name])} if name in times else {}
            changes[name] |= {"note": curve.note} if curve.note else {}
        return Plan(changes, skipped)

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        known = {layer.name: layer for layer in layers(graph) if layer.name in plan.changes}
        given = self._given(graph, task, self._chosen(graph)[0])

        def links(layer: Layer, matrix: Tensor, second: Tensor | None) -> tuple[list[Link], Tensor]:
            weight = matrix.reshape(given.plain(layer).shape)
            ranks = several(plan.changes[layer.name]["rank"])
            made = given.back(layer, self.links(layer, given.seen(layer, weight), second, ranks))
            return made, chain.composed(made, weight.shape).flatten(1) if self.composes else matrix

        made = {name: links(layer, given.plain(layer).flatten(1), given.second(layer)) for name, layer in known.items()}
        measured = dict[str, Any]()
        if self.recover and self.composes and self.samples and task.has("calibration") and made:
            ways = {name: partial(links, layer) for name, layer in known.items()}
            made, measured = replaced(graph, graph, (task, self.samples), made, ways)
        for name, layer in known.items():
            self.put(graph, layer, made[name][0])
        return measured

    def _chosen(self, graph: Graph) -> tuple[dict[str, Layer], dict[str, str]]:
        """The layers that may be factorized, and why others may not."""
        uses = Counter(layer.weight for layer in layers(graph))
        chosen, skipped = dict[str, Layer](), dict[str, str]()
        for layer in select(graph, self.include, self.exclude, self.kinds):
            reason = "it shares its weight" if uses[layer.weight] > 1 else unfit(graph, layer) or self.reason(graph, layer)
            if reason is None and self._budget() in ("macs", "latency") and layer.kind == "embedding":
                reason = "it has no multiply-accumulates"
            if reason:
                skipped[layer.name] = reason
            else:
                chosen[layer.name] = layer
        return chosen, skipped if skipped or chosen else {"*": f"the network has no layer that is a {' or '.join(self.kinds)}"}

    def _choices(self, curves: Mapping[str, Curve], weights: Mapping[str, Tensor], chosen: Mapping[str, Layer]) -> dict[str, int]:
        """The choice of each layer; of those that a budget leaves whole none."""
        budget = self._budget()
        if budget:
            return by_budget(curves, getattr(self, budget)) if curves else {}
        if self.rank is None:
            return {name: by_energy(curve, self.energy) for name, curve in curves.items()}
        found = {}
        for name, curve in curves.items():
            if isinstance(self.rank, str):
                ranks = self.apparent(chosen[name], weights[name])
            else:
                ranks = list(self.rank) if isinstance(self.rank, tuple) else [self.rank] * len(curve.of)
                if len(ranks) != len(curve.of) or any(rank > full for rank, full in zip(ranks, curve.of, strict=True)):
                    raise StepError(
                        f"{self.name()}: rank is {self.rank}, and the layer {name!r} has the full rank {_brief(curve.of)}.",
                        "ranks up to that",
                        "ask for less, or name the layer in exclude",
                    )
            found[name] = curve.nearest(ranks)
        return found

    def _kept(self, curve: Curve, choice: int | None, times: Sequence[float] | None) -> str | None:
        """Why a layer stays whole; None when it does not."""
        if times is not None and times[1] >= times[0]:
            return f"the chain takes {times[1]:.3f} ms, the layer {times[0]:.3f}"
        if choice is None:
            return "the budget is kept with less loss elsewhere" if bool(curve.pays.any()) else "factors of rank one cost no less"
        if curve.pays[choice]:
            return None
        how = (
            "that is asked for"
            if self.rank is not None and self.rank != "vbmf"
            else "of VBMF"
            if self.rank
            else "that keeps so much energy"
        )
        return f"at the rank {how}, {_brief(curve.rank(choice))}, the factors cost no less"

    def _costs(self, curve: Curve, choice: int) -> dict[str, list[Any]]:
        unit = self._budget() or "parameters"
        costs = [curve.whole, float(curve.costs[choice])]
        return {unit: costs if unit == "latency" else [int(cost) for cost in costs]}

    def _sketch(self, weight: Tensor, layer: Layer, ranks: Sequence[int]) -> list[Link]:
        """A chain of the right sizes."""
        return self.links(layer, torch.zeros_like(weight), None, ranks)

    def _budget(self) -> str | None:
        return next((name for name in _BUDGETS if getattr(self, name) is not None), None)

    def _given(self, graph: Graph, task: Task, chosen: Mapping[str, Layer]) -> Given:
        return Given(graph, task, self.samples, list(chosen.values()) if self.weighting == "outputs" else ())


def unfit(graph: Graph, layer: Layer) -> str | None:
    """Why a layer has no chain that could take its place; None when it may have."""
    dims = graph.tensor(layer.weight).ndim
    flat = not layer.node.kwargs and (dims == 2 or (layer.kind == "conv" and dims > 2))
    return irreplaceable(graph, layer) or (None if flat else "it is not a product of two matrices")


def per_dimension(layer: Layer, name: str) -> Any:
    """Stride, padding or dilation of a convolution for each dimension; padding may be a word."""
    value = read(layer.node, name)
    return value if isinstance(value, str) or len(value) > 1 else list(value) * (len(shape(layer.node)) - 2)


def several(ranks: int | Sequence[int]) -> list[int]:
    return [ranks] if isinstance(ranks, int) else list(ranks)


def _brief(ranks: list[int]) -> int | list[int]:
    return ranks[0] if len(ranks) == 1 else ranks


def missed(weight: Tensor, found: Tensor, second: Tensor | None) -> float:
    """The share of the energy of a weight, or of its outputs on inputs with these second moments, that another of its shape misses."""

    def energy(value: Tensor) -> float:
        flat = value.flatten(1)
        return float(
            (flat.square() if second is None else flat.square() * second if second.ndim == 1 else flat @ second.double() * flat).sum()
        )

    return max(0.0, energy(weight - found)) / max(energy(weight), 1e-300)
