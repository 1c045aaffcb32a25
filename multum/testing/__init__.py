"""For authors of steps: tiny models of every kind, and the checks that every step must pass on them."""

from .conformance import CHECKS, SLOW_CHECKS, Trial
from .zoo import CONFIGS, CORE, ZOO

__all__ = ["CHECKS", "CONFIGS", "CORE", "SLOW_CHECKS", "ZOO", "Trial"]
