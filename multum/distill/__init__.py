"""Distillation: training toward what the original model gives."""

from .hidden import Attention, Hidden, Relations
from .logits import Logits
from .teacher import Teacher, default_rate, recover

__all__ = ["Attention", "Hidden", "Logits", "Relations", "Teacher", "default_rate", "recover"]
