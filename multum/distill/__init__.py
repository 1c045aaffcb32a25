"""Distillation: training toward what the original model gives."""

from ..train import Teacher, default_rate, losses, recover
from .assistant import Assistant
from .datafree import DataFree
from .elastic import Elastic, slices
from .hidden import Attention, Hidden, Relations
from .logits import Logits
from .student import student
from .teachers import Teachers
from .unlabelled import Unlabelled

__all__ = [
    "Assistant",
    "Attention",
    "DataFree",
    "Elastic",
    "Hidden",
    "Logits",
    "Relations",
    "Teacher",
    "Teachers",
    "Unlabelled",
    "default_rate",
    "losses",
    "recover",
    "slices",
    "student",
]
