"""Distillation: training toward what the original model gives."""

from ..train import Teacher, default_rate, losses, recover
from .hidden import Attention, Hidden, Relations
from .logits import Logits
from .student import student

__all__ = ["Attention", "Hidden", "Logits", "Relations", "Teacher", "default_rate", "losses", "recover", "student"]
