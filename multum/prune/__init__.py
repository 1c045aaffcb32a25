"""Pruning: what is cut out for good, and what is set to zero."""

from .blocks import Blocks
from .channels import Channels
from .gradual import Gradual
from .heads import Heads
from .layers import Layers
from .neurons import Neurons
from .nm import NM
from .rewind import Rewind
from .shrink import Shrink
from .weights import Weights

__all__ = ["NM", "Blocks", "Channels", "Gradual", "Heads", "Layers", "Neurons", "Rewind", "Shrink", "Weights"]
