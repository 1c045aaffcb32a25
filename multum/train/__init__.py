"""The one training loop, and where its tensors lie."""

from .layout import arrange, lay_out
from .loop import Loss, Training, fit

__all__ = ["Loss", "Training", "arrange", "fit", "lay_out"]
