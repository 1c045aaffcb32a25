"""Sharing: many weights are one number, or many layers one tensor."""

from .clusters import Clusters
from .ties import Ties

__all__ = ["Clusters", "Ties"]
