"""Finding the recipe that meets a target."""

from .finish import Outcome
from .search import run, search
from .target import Target

__all__ = ["Outcome", "Target", "run", "search"]
