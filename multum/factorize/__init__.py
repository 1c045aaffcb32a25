"""Factorization: one layer becomes a chain of smaller ones."""

from .svd import SVD

__all__ = ["SVD"]
