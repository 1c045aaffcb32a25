"""Distillation: training toward what the original model gives."""

from .logits import Logits

__all__ = ["Logits"]
