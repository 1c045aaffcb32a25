"""Structured pruning of attention heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..step import option
from .cut import Cut


@dataclass(frozen=True)
class Heads(Cut):
    """Cuts heads of attention; where key-value heads are shared, one of them with its query heads, or a query head of each.

    Of the two the one that comes closer to the share asked for (Michel et al. 2019 and Voita et al. 2019 cut single heads;
    the criterion decides here as for any other channel).
    """

    kinds: ClassVar[tuple[str, ...]] = ("heads", "queries")

    multiple: int = option(1, "heads that are left are a multiple of this; smaller layers, of a half, a quarter ... of it")
