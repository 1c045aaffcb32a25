"""Lightening: layers and networks of the same form that compute less."""

from .activations import Activations
from .merge import Merge
from .reparameterize import Reparameterize
from .replace import Replace
from .scale import Scale

__all__ = ["Activations", "Merge", "Reparameterize", "Replace", "Scale"]
