"""Factorization: one layer becomes a chain of smaller ones."""

from .spatial import Spatial
from .svd import SVD
from .tucker import Tucker

__all__ = ["SVD", "Spatial", "Tucker"]
