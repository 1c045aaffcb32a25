"""Structured pruning of whatever can be cut."""

from __future__ import annotations

from dataclasses import dataclass

from .cut import Cut


@dataclass(frozen=True)
class Channels(Cut):
    """Cuts the channels with the lowest scores out of every layer they run through.

    Everything that must go together goes together: residual sums, concatenations, depthwise and grouped convolutions,
    heads of attention. Where a dimension is a product, such as heads and their width, only one of its factors is cut:
    the first that comes close to the share asked for. With calibration data the layers that read what was cut are refitted.
    """
