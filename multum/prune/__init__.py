"""Pruning: what is cut out for good, and what is set to zero."""

from .channels import Channels
from .nm import NM
from .weights import Weights

__all__ = ["NM", "Channels", "Weights"]
