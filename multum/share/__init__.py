"""Sharing: many weights are one number, or many layers one tensor."""

from .clusters import Clusters
from .hashing import Hashing
from .ties import Ties

__all__ = ["Clusters", "Hashing", "Ties"]
