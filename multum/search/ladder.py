"""The ladder: the recipes that the search tries, from gentle to strong, for what a task has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from ..distill import Logits
from ..graph.model import aten
from ..prune import Channels
from ..quantize import Half, RateDistortion, Static, WeightOnly
from ..step import Recipe, Step
from ..task import Task

# (share of the channels removed, bits of a weight, are activations int8 as well?)
# Up to FINE bits they are those of an entropy code, where the task has train data to recover with.
# Down to THIN bits they come before fewer channels: at the same size of the coded file they lose less. Below, half of the channels
# with twice the bits and more lose less, after a training that is several times as long.
ROWS = (
    (0.00, 16, False),
    (0.00, 8, False),
    (0.00, 8, True),
    (0.00, 4, True),
    (0.25, 8, True),
    (0.00, 3, True),
    (0.50, 8, True),
    (0.00, 2.0, True),
    (0.00, 1.4, True),
    (0.00, 1.0, True),
    (0.00, 0.7, True),
    (0.00, 0.5, True),
    (0.00, 0.3, True),
    (0.00, 0.15, True),
    (0.00, 0.08, True),
    (0.50, 2.0, True),
    (0.50, 1.3, True),
    (0.50, 0.7, True),
    (0.50, 0.4, True),
    (0.75, 1.3, True),
    (0.75, 0.5, True),
)
FINE, THIN = 2.0, 0.5
NARROW = 0.5  # share of the channels removed where bits alone do not do
_LEAST = 0.02  # fewer make no smaller file: what else is in it outweighs them
_START = 1.3  # bits at which weights meet their grid; training takes them down from here, which costs less than to begin below

# Passes over the training data after the weights were rounded to so many bits: the coarser, the longer.
EPOCHS = {3: 2.0}
_EPOCHS_CODED = 2.0
_EPOCHS_NARROW, _FAR = 3.0, 8.0  # after so deep a cut; where batch normalization allows steps that leave the old minimum
_TRAINED = 0.93  # of the limit is what a sketch may take: trained weights take as much entropy, but are coded a little less well


@dataclass(frozen=True)
class Rung:
    """A recipe of the ladder.

    `sketch` has the same structure and number formats, and very nearly the size, in seconds: without training and without a look at data.
    `twin` is the same with activations in floating point, where the recipe makes them integers; `draft` is the best without training.
    """

    name: str
    recipe: Recipe
    sketch: Recipe
    twin: Rung | None = None
    row: tuple[float, float, bool] | None = None  # of ROWS
    draft: Rung | None = None

    @property
    def trains(self) -> bool:
        return any(step.stage is None for step in self.recipe.flat())

    @property
    def coded(self) -> bool:
        """Whether its bits are those of an entropy code, so that there may be a little more or less of them."""
        return any(isinstance(step, RateDistortion) for step in self.recipe.flat())

    @property
    def thin(self) -> tuple[bool, float]:
        """What orders rungs of one size: those with too few bits come last, else the wider ones first."""
        share, bits, _ = self.row or (0.0, 32.0, False)
        return bits < THIN, share

    @property
    def passes(self) -> float:
        """Over the training data, in all."""
        return sum(float(getattr(step, "epochs", 0.0)) for step in self.recipe.flat() if step.stage is None)

    def longer(self, factor: float) -> Rung:
        """The same with `factor` times the training."""
        return replace(self, name=f"{self.name}, {factor:g}x the training", recipe=Recipe([_longer(s, factor) for s in self.recipe.flat()]))


def ladder(task: Task) -> list[Rung]:
    """The rungs for a task: no recovery without train data, weights alone without calibration data."""
    rungs: dict[Recipe, Rung] = {}
    for share, bits, integer in ROWS:
        made = rung(task, share, bits, integer)
        rungs.setdefault(made.recipe, made)
    return list(rungs.values())


def rung(task: Task, share: float, bits: float, integer: bool) -> Rung:
    """The rung of a row, with what the task has."""
    trains, sees = task.train is not None, task.has("calibration")
    if not (trains or sees):
        bits = max(2, math.ceil(bits))
    made = _rung(share, bits, integer and sees, trains, sees, far := trains and bool(task.original.find(aten.batch_norm.default)))
    return replace(made, twin=_rung(share, bits, False, trains, sees, far)) if integer and sees else made


def coded(task: Task, row: tuple[float, float, bool], bits: float) -> Rung:
    """The rung of a row, with another number of coded bits, as far as bits can be of use."""
    return rung(task, row[0], round(min(max(bits, _LEAST), FINE), 3), row[2])


def between(task: Task, sizes: Mapping[Rung, int], limit: int, share: float = 0.0) -> Rung | None:
    """The rung whose file has just the size of the limit, by the `sizes` of the coded rungs of the same width: a straight line in bits."""
    known = sorted((size, made.row[1]) for made, size in sizes.items() if made.row and made.row[0] == share and made.coded)
    wanted = _TRAINED * limit
    for (size, bits), (larger, more) in itertools.pairwise(known):
        if size <= wanted < larger:
            return coded(task, (share, bits, True), bits + (more - bits) * (wanted - size) / (larger - size))
    return None


def _rung(share: float, bits: float, integer: bool, trains: bool, sees: bool, far: bool = False) -> Rung:
    parts = [f"{share:.0%} of the channels removed"] if share else []
    name = ", ".join([*parts, f"{bits:g}-bit weights", "int8 activations" if integer else "float activations"])
    codes = bits <= FINE and (trains or sees)
    recipe, sketch = (Recipe(list(_steps(share, bits, integer, codes, *has))) for has in ((trains, sees, far), (False, False, False)))
    made = Rung(name, recipe, sketch, row=(share, bits, integer))
    if not (trains and sees):
        return made
    draft, twin = (_rung(share, bits, form, False, True) for form in (integer, False))
    draft, twin = (replace(one, name=f"{one.name}, not trained") for one in (draft, twin))
    return replace(made, draft=replace(draft, twin=twin if integer else None))


def _steps(share: float, bits: float, integer: bool, codes: bool, trains: bool, sees: bool, far: bool) -> Iterator[Step]:
    """Weights are rounded first and recovered while activations are still exact, which trains faster; activations come last."""
    if share:
        yield Channels(ratio=share, allocation="uniform") if sees else Channels(ratio=share, criterion="magnitude", recover=False)
        if trains and codes and share >= NARROW:
            yield Logits(epochs=_FAR, optimizer="sgd") if far else Logits(epochs=_EPOCHS_NARROW)
        elif trains:
            yield Logits(epochs=1.0 if share > 0.3 else 0.5)
    if codes and trains:  # which chooses better than any rounding
        yield RateDistortion(bits=max(bits, _START), rounding="nearest")
        yield Logits(bits=bits, epochs=_EPOCHS_CODED)
    elif codes:
        yield RateDistortion(bits=bits, rounding="coded" if sees else "nearest")
    elif bits < 8:
        yield WeightOnly(bits=int(bits), rounding="auto" if sees else "nearest")
        if trains:
            yield Logits(epochs=EPOCHS.get(int(bits), 1.0))
    if integer:
        yield Static()
        if trains and bits == 8:
            yield Logits()
    elif bits == 8:
        yield WeightOnly()
    yield Half()


def _longer(step: Step, factor: float) -> Step:
    if step.stage is None and any(field.name == "epochs" for field in fields(step)):
        return replace(step, epochs=step.epochs * factor)  # type: ignore[attr-defined, call-arg]
    return step
