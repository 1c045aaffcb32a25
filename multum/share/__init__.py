"""Sharing: many weights are one number, or many layers one tensor."""

from .clusters import Clusters

__all__ = ["Clusters"]
