"""What a student is held to: the teacher's probabilities where outputs are logits of classes, its values elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import StepError
from ..task import tensors

_NAMES = ("logits", "scores")


def soft_labels(student: Tensor, teacher: Tensor, temperature: float, dim: int = -1) -> Tensor:
    """KL divergence of the student's from the teacher's probabilities at a temperature, times its square, averaged over all but `dim`.

    The square keeps the gradient's size when the temperature changes (Hinton, Vinyals & Dean 2015, section 2).
    """
    if temperature <= 0:
        raise StepError(f"The temperature is {temperature!r}.", "a number above zero")
    log_student = F.log_softmax(student.float() / temperature, dim)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim)
    return divergence.mean() * temperature**2


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error relative to the teacher's mean square, so that the size of an output does not weigh."""
    student, teacher = student.float(), teacher.float()
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine along the last dimension, averaged: for embeddings [..., d] that are compared by angle."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def imitation(student: Any, teacher: Any, targets: Any, temperature: float) -> Tensor:
    """The sum over all floating-point outputs: soft labels for logits of classes, relative squared error for the rest.

    Logits are outputs so named, and outputs [n, ..., classes] (images: [n, classes, h, w]) for which the targets hold
    integers [n, ...]. Raises StepError when student and teacher do not give the same outputs.
    """
    ours, theirs = (list(_named(value)) for value in (student, teacher))
    if [(name, value.shape) for name, value in ours] != [(name, value.shape) for name, value in theirs]:
        raise StepError(
            f"The student gives {_describe(ours)}, the teacher {_describe(theirs)}.",
            "the same outputs with the same number of classes",
        )
    if not ours:
        raise StepError("The model's outputs hold no floating-point tensor.", "at least one, such as logits")
    total = torch.zeros((), device=ours[0][1].device)
    for (name, value), (_, wanted) in zip(ours, theirs, strict=True):
        dim = _classes(name, value, targets)
        total = total + (squared_error(value, wanted) if dim is None else soft_labels(value, wanted, temperature, dim))
    return total


def _classes(name: str, value: Tensor, targets: Any) -> int | None:
    """The dimension of the classes, or None when the output is not known to be logits."""
    if value.ndim < 2:
        return None
    dim = 1 if value.ndim == 4 else value.ndim - 1
    labels = value.shape[:dim] + value.shape[dim + 1 :]
    counted = any(not target.is_floating_point() and target.shape == labels for target in tensors(targets))
    return dim if counted or name.rpartition(".")[2] in _NAMES else None


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of nested outputs with their place in them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping | tuple | list):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named(part, f"{name}.{key}" if name else str(key))


def _describe(outputs: list[tuple[str, Tensor]]) -> str:
    return ", ".join(f"{name or 'an output'} {list(value.shape)}" for name, value in outputs) or "nothing"
