"""The one training loop, and where its tensors lie."""

from .companion import Companion
from .layout import arrange, lay_out
from .loop import Loss, fit
from .optimizer import Training
from .rate import Rate, entropy

__all__ = ["Companion", "Loss", "Rate", "Training", "arrange", "entropy", "fit", "lay_out"]
