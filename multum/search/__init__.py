"""Finding the recipe that meets a target."""

from .finish import Outcome
from .search import run, search
from .students import Students, students
from .target import Target

__all__ = ["Outcome", "Students", "Target", "run", "search", "students"]
