"""Quantization: numbers on coarse grids, so that files are small and integer kernels run."""

from .activations import Activations
from .aware import Aware
from .binary import Binary
from .dynamic import Dynamic
from .equalize import Equalize
from .half import Half
from .mixed import Mixed
from .non_uniform import FixedPoint, NonUniform
from .rate import RateDistortion
from .static import Static
from .weight_only import WeightOnly

__all__ = [
    "Activations", "Aware", "Binary", "Dynamic", "Equalize", "FixedPoint", "Half", "Mixed", "NonUniform", "RateDistortion", "Static",
    "WeightOnly",
]  # fmt: skip
