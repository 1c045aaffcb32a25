"""The one training loop, and where its tensors lie."""

from .layout import arrange, lay_out
from .loop import Loss, Training, fit
from .rate import entropy

__all__ = ["Loss", "Training", "arrange", "entropy", "fit", "lay_out"]
