"""Distillation: training toward what the original model gives."""

from ..train import Teacher, default_rate, losses, recover
from .assistant import Assistant
from .datafree import DataFree
from .elastic import Elastic, slices
from .exits import Cascade, Self, exits
from .hidden import Attention, Hidden, Relations
from .light import affinity, light, zoo
from .logits import Logits
from .peers import Peers
from .student import student
from .tasks import Tasks
from .teachers import Teachers
from .unlabelled import Unlabelled

__all__ = [
    "Assistant",
    "Attention",
    "Cascade",
    "DataFree",
    "Elastic",
    "Hidden",
    "Logits",
    "Peers",
    "Relations",
    "Self",
    "Tasks",
    "Teacher",
    "Teachers",
    "Unlabelled",
    "affinity",
    "default_rate",
    "exits",
    "light",
    "losses",
    "recover",
    "slices",
    "student",
    "zoo",
]
