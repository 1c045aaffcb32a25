"""The ladder: the recipes that the search tries, from gentle to strong, for what a task has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from ..distill import Logits
from ..prune import Channels
from ..quantize import Half, Static, WeightOnly
from ..step import Recipe, Step
from ..task import Task

# (share of the channels removed, bits of a weight, are activations int8 as well?)
# Fewer bits come before fewer channels: at the same size of the coded file they lose less.
ROWS = (
    (0.00, 16, False),
    (0.00, 8, False),
    (0.00, 8, True),
    (0.00, 4, True),
    (0.25, 8, True),
    (0.00, 3, True),
    (0.50, 8, True),
    (0.00, 2, True),
    (0.10, 2, True),
    (0.20, 2, True),
    (0.30, 2, True),
    (0.50, 3, True),
    (0.40, 2, True),
    (0.50, 2, True),
    (0.75, 3, True),
    (0.75, 2, True),
)


# Passes over the training data after the weights were rounded to so many bits: the coarser, the longer.
EPOCHS = {2: 4.5, 3: 2.0}


@dataclass(frozen=True)
class Rung:
    """A recipe of the ladder. `twin` is the same with activations in floating point, where the recipe makes them integers."""

    name: str
    recipe: Recipe
    twin: Rung | None = None

    @property
    def sketch(self) -> Recipe:
        """The recipe without its training steps: the same structure and number formats, in seconds."""
        return Recipe([step for step in self.recipe.flat() if step.stage is not None])

    @property
    def trains(self) -> bool:
        return any(step.stage is None for step in self.recipe.flat())

    def longer(self, factor: float) -> Rung:
        """The same with `factor` times the training."""
        return replace(self, name=f"{self.name}, {factor:g}x the training", recipe=Recipe([_longer(s, factor) for s in self.recipe.flat()]))


def ladder(task: Task) -> list[Rung]:
    """The rungs for a task: no recovery without train data, weights alone without calibration data."""
    calibrates = task.calibration is not None or task.train is not None
    rungs: dict[Recipe, Rung] = {}
    for share, bits, integer in ROWS:
        twin = _rung(task, share, bits, False)
        rung = replace(_rung(task, share, bits, True), twin=twin) if integer and calibrates else twin
        rungs.setdefault(rung.recipe, rung)
    return list(rungs.values())


def _rung(task: Task, share: float, bits: int, integer: bool) -> Rung:
    parts = [f"{share:.0%} of the channels removed"] if share else []
    parts += [f"{bits}-bit weights", "int8 activations" if integer else "float activations"]
    return Rung(", ".join(parts), Recipe(list(_steps(task, share, bits, integer))))


def _steps(task: Task, share: float, bits: int, integer: bool) -> Iterator[Step]:
    """Weights are rounded first and recovered while activations are still exact, which trains faster; activations come last."""
    recovers = task.train is not None
    if share:
        yield Channels(ratio=share)
        if recovers:
            yield Logits(epochs=1.0 if share > 0.3 else 0.5)
    if bits < 8:
        yield WeightOnly(bits=bits)
        if recovers:
            yield Logits(epochs=EPOCHS.get(bits, 1.0))
    if integer:
        yield Static()
        if recovers and bits == 8:
            yield Logits()
    elif bits == 8:
        yield WeightOnly()
    yield Half()


def _longer(step: Step, factor: float) -> Step:
    if step.stage is None and any(field.name == "epochs" for field in fields(step)):
        return replace(step, epochs=step.epochs * factor)  # type: ignore[attr-defined, call-arg]
    return step
