"""Distillation: training toward what the original model gives."""

from .logits import Logits
from .teacher import Teacher, default_rate, recover

__all__ = ["Logits", "Teacher", "default_rate", "recover"]
