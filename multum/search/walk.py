"""The walk over the ladder: sizes first, then recovery of what is small enough, until the target is met."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import FileError, MissingExtra, MultumError, TaskError
from .evaluate import Candidate, Workshop
from .judge import Judge
from .ladder import NARROW, Rung, between, coded, ladder

_SLOWER = 1.05  # integer activations are kept where they are faster than floating-point ones by more than this
_LONGER = 3.0  # times the training, when a recipe loses too much
_FITS, _FULL = 4, 0.97  # files made to fill the size that is allowed to this part
_HALVINGS = 2  # of the bits between what loses little enough and what does not


@dataclass(eq=False)
class Try:
    """A rung and a candidate made of it; `kept` is false where its twin measured better."""

    rung: Rung
    candidate: Candidate
    kept: bool = True


class Walk:
    """One walk over the ladder. `tried` holds what was measured, `failed` what could not be made, with the reason."""

    def __init__(self, workshop: Workshop, judge: Judge, original: Candidate):
        self.workshop, self.judge, self.original, self.tell = workshop, judge, original, workshop.tell
        self.tried: list[Try] = []
        self.failed: list[dict[str, Any]] = []
        self.sketched: list[Try] = []
        self.lost = 0  # rungs in a row that missed the target
        self.start = time.monotonic()
        self.last: MultumError | None = None

    @property
    def best(self) -> Candidate:
        return min((step.candidate for step in self.tried if step.kept), key=self.judge.rank)

    def run(self) -> str | None:
        """Fills `tried`; says "minutes" when these ended the walk. Raises the last error when nothing could be made at all."""
        limit = self.judge.target.limit(self.original.bytes)
        for rung in ladder(self.workshop.task):
            with self._recording(rung):
                self.sketched.append(self._sketch(rung))
        sizes = {step.rung: step.candidate.bytes for step in self.sketched}
        task = self.workshop.task
        exact = {share: made for share in (0.0, NARROW) if limit is not None and (made := between(task, sizes, limit, share))}
        for rung in exact.values():
            with self._recording(rung):
                self.sketched.append(self._sketch(rung))
        if self.last and not self.sketched:
            raise self.last
        self.sketched.sort(key=lambda step: -step.candidate.bytes)
        fitting = [step for step in self.sketched if limit is None or step.candidate.bytes <= limit]
        # of the rungs that differ in bits alone, the one with most of them that fits loses least
        first = sorted((step for step in fitting if step.rung in exact.values()), key=lambda step: step.rung.thin)
        fitting = first + [step for step in fitting if not (step.rung.row and step.rung.row[0] in exact)]
        if not fitting:
            self.tell("No recipe of the ladder is small enough; the smallest is tried.")
        took, passes = 0.0, 0.0
        for step in self._steps(fitting or self.sketched[-1:], 1 if first else 2):
            longer = max(1.0, step.rung.passes / passes) if passes else 1.0
            if took and self._late(took * longer):
                return "minutes"
            begin, before, passes = time.monotonic(), len(self.tried), step.rung.passes
            with self._recording(step.rung):
                self._climb(step)
            met = any(step.kept and not self.judge.missed(step.candidate) for step in self.tried[before:])
            self.lost = 0 if met else self.lost + 1
            if self._enough(met):
                break
            took = time.monotonic() - begin
        if self.last and not self.tried:
            raise self.last
        return None if limit is not None or self.judge.target.speed is not None else self._refine(took)

    def _refine(self, took: float) -> str | None:
        """Fewer bits than the smallest that meets the drop has, and more than the next, which does not."""
        for _ in range(_HALVINGS):
            best = next(step for step in self.tried if step.candidate is self.best).rung
            rows = [step.rung.row for step in self.tried if step.rung.row and best.row and step.rung.row[0] == best.row[0]]
            fewer = [row[1] for row in rows if best.row and row[1] < best.row[1]]
            if not (best.coded and best.row and fewer) or self.judge.missed(self.best):
                return None
            if self._late(took):
                return "minutes"
            middle = coded(self.workshop.task, best.row, math.sqrt(best.row[1] * max(fewer)))
            with self._recording(middle):
                self._climb(self._sketch(middle))
        return None

    def _sketch(self, rung: Rung) -> Try:
        name = f"{rung.name}, not trained" if rung.trains else rung.name
        return Try(rung, self.workshop.build(name, rung.sketch))

    def _plain(self, rung: Rung) -> Try:
        """The rung without training, if it has any."""
        return self._sketch(rung) if rung.trains else Try(rung, self.workshop.build(rung.name, rung.recipe))

    def _steps(self, fitting: list[Try], first: int) -> Iterator[Try]:
        """What to try, in turn: the first rungs, more training for the best of them, then the other rungs."""
        yield from fitting[:first]
        target = self.judge.target
        trained = [step for step in self.tried if step.kept and step.rung.trains]
        if trained and not (target.size is None and target.speed is None):
            best = min(trained, key=lambda step: self.judge.rank(step.candidate))
            yield self._sketch(best.rung.longer(_LONGER))
        yield from fitting[first:]

    def _climb(self, step: Try) -> None:
        """Measures the rung without its training, then, unless that is enough, with it."""
        target, judge, rung = self.judge.target, self.judge, step.rung
        step = self._untrained(step)
        if all(step.candidate.folder != other.candidate.folder for other in self.tried):
            step = self._faster(step)
        if not rung.trains or judge.safe(step.candidate) or "speed" in judge.missed(step.candidate):
            return
        if rung.twin and not step.rung.twin:
            rung = rung.twin
        drop = judge.drop(self.original.scores, step.candidate.scores)
        if drop and target.max_drop is not None and drop.points > target.max_drop:
            self.tell(f"Without recovery the drop is {drop.points:.2f}, over the {target.max_drop:g} allowed. Recovery starts.")
        made = self.workshop.build(rung.name, rung.recipe)
        self.tried.append(Try(rung, self._measured(made)))

    def _untrained(self, step: Try) -> Try:
        """The rung as good as it gets without training; where its weights are coded, with as many bits as the size allows."""
        task, limit, rung = self.workshop.task, self.judge.target.limit(self.original.bytes), step.rung.draft or step.rung
        found = [self._plain(rung)]
        if not limit or not rung.row or not rung.coded or rung.trains:
            return found[0]
        while len(found) < _FITS and not _FULL * limit <= found[-1].candidate.bytes <= limit:
            rung = coded(task, rung.row, rung.row[1] * math.sqrt(_FULL) * limit / found[-1].candidate.bytes)
            rung = rung.draft or rung
            if rung.recipe == found[-1].rung.recipe:  # no more bits than these
                break
            found.append(self._plain(rung))
        fitting = [made for made in found if made.candidate.bytes <= limit]
        return max(fitting or found[-1:], key=lambda made: made.candidate.bytes)

    def _faster(self, step: Try) -> Try:
        """The rung, measured; or its twin with floating-point activations when integers do not measure faster."""
        step = Try(step.rung, self._measured(step.candidate))
        self.tried.append(step)
        if step.rung.twin is None:
            return step
        twin = self._plain(step.rung.twin)
        twin.candidate = self._measured(twin.candidate)
        self.tried.append(twin)
        mine, other = step.candidate.speed or 0.0, twin.candidate.speed or 0.0
        step.kept = mine > _SLOWER * other
        twin.kept = not step.kept
        if step.kept:
            return step
        self.tell(f"int8 activations are not faster here ({mine:.2f}x against {other:.2f}x): they stay float.")
        return twin

    def _measured(self, candidate: Candidate) -> Candidate:
        made = self.workshop.measure(candidate, self.original)
        drop = self.judge.drop(self.original.scores, made.scores)
        lost = f", drop {drop.points:.2f}" if drop else ""
        self.tell(f"{made.name}: {self.original.bytes / made.bytes:.1f}x smaller, {made.speed:.2f}x faster{lost}")
        return made

    @contextmanager
    def _recording(self, rung: Rung) -> Iterator[None]:
        """A failure of this rung alone is recorded, and the walk goes on; a full disk or bad data ends it."""
        try:
            yield
        except (FileError, TaskError, MissingExtra):
            raise
        except Exception as error:
            self.last = error if isinstance(error, MultumError) else MultumError(f"{rung.name}: {type(error).__name__}: {error}")
            self.failed.append({"name": rung.name, "recipe": rung.recipe.to_data(), "error": str(error)})
            self.tell(f"{rung.name} failed: {error}")

    def _enough(self, met: bool) -> bool:
        """Met; or, when the smallest model within a drop is looked for, two rungs in a row that lose too much."""
        target = self.judge.target
        if target.size is None and target.speed is None:
            return self.lost >= 2
        return met

    def _late(self, seconds: float) -> bool:
        """Whether an attempt of so many seconds would overrun the time by more than a tenth."""
        minutes = self.judge.target.minutes
        return minutes is not None and time.monotonic() - self.start + seconds > 66 * minutes

    def to_data(self) -> list[dict[str, Any]]:
        """Every candidate, for the plot and the record."""
        best = self.best
        measured = [step.candidate.to_data() | {"chosen": step.candidate is best} for step in self.tried]
        known = {row["name"] for row in measured}
        rest = [step.candidate.to_data() for step in self.sketched if step.candidate.name not in known]
        return measured + rest + self.failed
