"""The one training loop, where its tensors lie, and training toward the original."""

from .augment import Augment
from .average import Average
from .board import shown
from .companion import Companion
from .layout import arrange, lay_out
from .loop import Loss, fit
from .optimizer import OPTIMIZER, Training, default_rate
from .rate import Rate, entropy
from .teacher import Teacher, recover
from .unfreeze import Unfreeze

__all__ = [
    "OPTIMIZER",
    "Augment",
    "Average",
    "Companion",
    "Loss",
    "Rate",
    "Teacher",
    "Training",
    "Unfreeze",
    "arrange",
    "default_rate",
    "entropy",
    "fit",
    "lay_out",
    "recover",
    "shown",
]
