"""Quantization: numbers on coarse grids, so that files are small and integer kernels run."""

from .half import Half
from .rate import RateDistortion
from .static import Static
from .weight_only import WeightOnly

__all__ = ["Half", "RateDistortion", "Static", "WeightOnly"]
