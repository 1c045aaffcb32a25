"""Factorization: one layer becomes a chain of smaller ones."""

from .cp import CP
from .quantized import Quantized
from .spatial import Spatial
from .svd import SVD
from .tensor_train import TensorTrain
from .tucker import Tucker

__all__ = ["CP", "SVD", "Quantized", "Spatial", "TensorTrain", "Tucker"]
