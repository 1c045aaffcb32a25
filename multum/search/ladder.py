"""The ladder: the recipes that the search tries, from gentle to strong, for what a task has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from ..distill import Logits
from ..prune import Channels
from ..quantize import Half, RateDistortion, Static, WeightOnly
from ..step import Recipe, Step
from ..task import Task

# (share of the channels removed, bits of a weight, are activations int8 as well?)
# Up to FINE bits they are those of an entropy code, where the task has train data to recover with.
# Fewer bits come before fewer channels: at the same size of the coded file they lose less.
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
    (0.25, 0.5, True),
    (0.50, 0.7, True),
    (0.50, 0.5, True),
    (0.50, 0.35, True),
    (0.75, 0.5, True),
    (0.75, 0.35, True),
)
FINE = 2.0
_START = 1.3  # bits at which weights meet their grid; training takes them down from here, which costs less than to begin below

# Passes over the training data after the weights were rounded to so many bits: the coarser, the longer.
EPOCHS = {3: 2.0}
_EPOCHS_CODED = 2.0
_TRAINED = 0.93  # of the limit is what a sketch may take: trained weights take as much entropy, but are coded a little less well


@dataclass(frozen=True)
class Rung:
    """A recipe of the ladder.

    `sketch` has the same structure and number formats without training, and very nearly the size, in seconds. `twin` is the same with
    activations in floating point, where the recipe makes them integers.
    """

    name: str
    recipe: Recipe
    sketch: Recipe
    twin: Rung | None = None
    row: tuple[float, float, bool] | None = None  # of ROWS

    @property
    def trains(self) -> bool:
        return any(step.stage is None for step in self.recipe.flat())

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
    if task.train is None:
        bits = max(2, math.ceil(bits))
    twin = _rung(task, share, bits, False)
    return replace(_rung(task, share, bits, True), twin=twin) if integer and task.has("calibration") else twin


def between(task: Task, sizes: Mapping[Rung, int], limit: int) -> Rung | None:
    """The rung whose file has just the size of the limit, by the `sizes` of the coded rungs at full width: a straight line in bits."""
    coded = sorted((size, made.row[1]) for made, size in sizes.items() if made.row and made.row[0] == 0 and made.row[1] <= FINE)
    for (size, bits), (larger, more) in itertools.pairwise(coded):
        if task.train is not None and size <= _TRAINED * limit < larger:
            return rung(task, 0.0, round(bits + (more - bits) * (_TRAINED * limit - size) / (larger - size), 3), True)
    return None


def _rung(task: Task, share: float, bits: float, integer: bool) -> Rung:
    parts = [f"{share:.0%} of the channels removed"] if share else []
    parts += [f"{bits:g}-bit weights", "int8 activations" if integer else "float activations"]
    recovers = task.train is not None
    recipe, sketch = (Recipe(list(_steps(share, bits, integer, trains, bits <= FINE and recovers))) for trains in (recovers, False))
    return Rung(", ".join(parts), recipe, sketch, row=(share, bits, integer))


def _steps(share: float, bits: float, integer: bool, trains: bool, codes: bool) -> Iterator[Step]:
    """Weights are rounded first and recovered while activations are still exact, which trains faster; activations come last."""
    if share:
        yield Channels(ratio=share, criterion="magnitude", recover=False)  # every rung is built: what takes seconds has to do
        if trains:
            yield Logits(epochs=1.0 if share > 0.3 else 0.5)
    if codes:
        yield RateDistortion(bits=max(bits, _START) if trains else bits, rounding="nearest")  # training chooses better than any rounding
        if trains:
            yield Logits(bits=bits, epochs=_EPOCHS_CODED)
    elif bits < 8:
        yield WeightOnly(bits=int(bits))
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
