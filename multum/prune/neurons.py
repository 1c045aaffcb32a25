"""Structured pruning of hidden neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .cut import Cut


@dataclass(frozen=True)
class Neurons(Cut):
    """Cuts hidden neurons: what linear layers make and linear layers read, as in MLPs, gated or not, and nothing else."""

    kinds: ClassVar[tuple[str, ...]] = ("neurons",)
