"""Tiny models of the kinds that users bring, with random weights: `ZOO[name]()` gives a model and an example batch of two."""

from . import attention, configs, images, installed, scenes, sequences, tables  # noqa: F401 (each registers its models)
from .configs import CONFIGS
from .entry import ZOO
from .images import Residual, conv
from .installed import INSTALLED
from .tables import branching

# One small model of each kind, for tests that shall be fast.
CORE = (
    "resnet", "mobilenet", "densenet", "squeeze_excite", "shufflenet_v2", "unet", "detector", "mlp", "tuple_inputs", "keyword_inputs",
    "conv1d", "lstm", "bidirectional_gru", "tied_weights", "fused_attention", "grouped_queries",
)  # fmt: skip

__all__ = ["CONFIGS", "CORE", "INSTALLED", "ZOO", "Residual", "branching", "conv"]
