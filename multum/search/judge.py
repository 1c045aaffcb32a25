"""How far a candidate is from the target, and which of two is the better."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..analyze.statistics import Drop, compare
from ..task import Task
from .evaluate import Candidate, Scores
from .target import Target


@dataclass(frozen=True)
class Judge:
    """Measures candidates against a target; everything is relative to the original."""

    task: Task
    target: Target
    original: Candidate

    def drop(self, before: Scores | None, after: Scores | None) -> Drop | None:
        """What was lost from `before` to `after`, in points; None where nothing is scored."""
        if before is None or after is None:
            return None
        return compare(before, after, self.task.higher_is_better)

    def misses(self, size: int, speed: float | None, points: float | None) -> dict[str, float]:
        """By how much each part of the target is missed, relative to what was asked; empty when all are met."""
        found = {}
        limit = self.target.limit(self.original.bytes)
        if limit is not None and size > limit:
            found["size"] = size / limit - 1 if limit else math.inf
        if self.target.speed is not None and (speed or 0.0) < float(self.target.speed):
            found["speed"] = float(self.target.speed) / max(speed or 0.0, 1e-6) - 1
        if self.target.max_drop is not None and points is not None and points > self.target.max_drop:
            unit = max(self.target.max_drop, 0.01 * abs(self.original.score or 0.0), 1e-9)
            found["drop"] = (points - self.target.max_drop) / unit
        return found

    def missed(self, candidate: Candidate) -> dict[str, float]:
        """The same for a measured candidate, on the validation data."""
        drop = self.drop(self.original.scores, candidate.scores)
        return self.misses(candidate.bytes, candidate.speed, drop.points if drop else None)

    def safe(self, candidate: Candidate) -> bool:
        """Whether the drop is within what is allowed with 95 % confidence, so that recovery would be wasted time."""
        drop = self.drop(self.original.scores, candidate.scores)
        if drop is None or self.target.max_drop is None:
            return False
        return (drop.points if drop.bound is None else drop.bound) <= self.target.max_drop

    def rank(self, candidate: Candidate) -> tuple[float, ...]:
        """Smaller is better: nearest to the target, then not slower than the original, then what was not asked for."""
        drop = self.drop(self.original.scores, candidate.scores)
        points = drop.points if drop else 0.0
        last = (points, candidate.bytes) if self.target.size is not None or self.target.max_drop is None else (candidate.bytes, points)
        return sum(self.missed(candidate).values()), float((candidate.speed or 0.0) < 1.0), *last
