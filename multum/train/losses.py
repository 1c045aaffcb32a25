"""What a student is held to: the teacher's probabilities where outputs are logits of classes, its values elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import StepError
from ..task import tensors

LIKENESSES = ("soft", "decoupled", "correlated", "standardized")
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


def standardized(logits: Tensor, dim: int = -1) -> Tensor:
    """Logits with mean 0 and deviation 1 over the classes: only their pattern is learned (Sun et al. 2024, section 3.3)."""
    logits = logits.float()
    return (logits - logits.mean(dim, keepdim=True)) / (logits.std(dim, keepdim=True, correction=0) + 1e-7)


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """Soft labels in two parts, [n, classes] and labels [n]: how sure of the labelled class (`alpha`), and which others (`beta`).

    Zhao et al. 2022 (DKD), equation 7; times the square of the temperature.
    """
    ours, theirs = student.float() / temperature, teacher.float() / temperature
    labelled = F.one_hot(labels, ours.shape[1]).bool()

    def two(logits: Tensor) -> Tensor:
        sure = F.log_softmax(logits, 1)[labelled]
        return torch.stack([sure, torch.log1p(-sure.exp().clamp(max=1 - 1e-7))], 1)

    def rest(logits: Tensor) -> Tensor:
        return F.log_softmax(logits[~labelled].view(len(logits), -1), 1)

    target, others = (F.kl_div(f(ours), f(theirs), reduction="batchmean", log_target=True) for f in (two, rest))
    return (alpha * target + beta * others) * temperature**2


def correlated(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """One minus Pearson's correlation of the probabilities [n, classes], of each sample over classes plus of each class over samples.

    Huang et al. 2022 (DIST), equation 10.
    """
    ours, theirs = (F.softmax(logits.float() / temperature, 1) for logits in (student, teacher))
    total: Tensor = _apart(ours, theirs) + _apart(ours.T, theirs.T)
    return total * temperature**2


def _apart(a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = (1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)).mean()
    return found


def projected(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error [] of the teacher's channels from the best linear map of the student's, relative to the teacher's variance.

    Both [n, channels, ...] or [n, positions, channels], of any numbers of channels. The hint of Romero et al. 2015 (FitNets, equation 3)
    with the regressor solved for in each batch instead of learned: at its minimum it adds nothing to the gradient.
    """
    ours, theirs = (_rows(value) - _rows(value).mean(0) for value in (student, teacher))
    with torch.no_grad():
        gram = ours.T @ ours
        ridge = 1e-3 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), device=gram.device)
        regressor = torch.linalg.solve(gram + ridge, ours.T @ theirs)
    error: Tensor = (ours @ regressor - theirs).square().sum() / theirs.square().sum().clamp_min(1e-12)
    return error


def patient(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the values, each sample's of norm one (Sun et al. 2019 (PKD), equation 7): [n, ...] of the same shape."""
    ours, theirs = (F.normalize(value.float().flatten(1), dim=1) for value in (student, teacher))
    return (ours - theirs).square().sum(1).mean()


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of where the energy lies, each sample's map of norm one: [n, channels, places ...] with the same places.

    Zagoruyko & Komodakis 2017 (AT), equation 2 with p = 2.
    """
    ours, theirs = (F.normalize(value.float().square().mean(1).flatten(1), dim=1) for value in (student, teacher))
    return (ours - theirs).square().sum(1).mean()


def self_relations(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """KL divergence of how positions relate: softmax of the scaled products of queries, keys or values [n, positions, width].

    Wang et al. 2021 (MiniLMv2), equation 5: widths are split into `heads` anew, so that they need not agree.
    """
    ours, theirs = (_relation(value.float(), heads) for value in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()


def _relation(value: Tensor, heads: int) -> Tensor:
    parts = value.reshape(*value.shape[:-1], heads, -1).transpose(1, 2)
    return F.log_softmax(parts @ parts.mT / parts.shape[-1] ** 0.5, -1)


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the distances between samples, relative to their mean (Park et al. 2019 (RKD), equations 5 and 6): [n, ...]."""

    def between(value: Tensor) -> Tensor:
        flat = value.float().flatten(1)
        squares = (flat[:, None] - flat[None]).square().sum(-1)
        found = torch.where(squares > 0, squares.clamp_min(1e-12).sqrt(), 0.0)
        return found / found[found > 0].mean() if bool((found > 0).any()) else found

    return F.smooth_l1_loss(between(student), between(teacher))


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles between three samples (Park et al. 2019 (RKD), equations 8 and 9): [n, ...]."""

    def between(value: Tensor) -> Tensor:
        flat = value.float().flatten(1)
        sides = F.normalize(flat[None] - flat[:, None], dim=2)
        return sides @ sides.mT

    return F.smooth_l1_loss(between(student), between(teacher))


def similarities(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of how alike samples are, [n, n] with rows of norm one (Tung & Mori 2019, equations 1 to 4): [n, ...]."""

    def between(value: Tensor) -> Tensor:
        flat = value.float().flatten(1)
        return F.normalize(flat @ flat.T, dim=1)

    return (between(student) - between(teacher)).square().sum() / len(student) ** 2


def contrast(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of finding, for a sample of the student, the teacher's of the same sample in the batch: [n, ...].

    As Tian et al. 2020 (CRD), section 3.1, with the batch for negatives and both sides' similarity to the batch's teacher in place of
    learned embeddings, so that widths need not agree.
    """
    ours, theirs = (_relative_to(value) for value in (student, teacher))
    return F.cross_entropy(ours @ theirs.T / temperature, torch.arange(len(ours), device=ours.device))


def _relative_to(value: Tensor) -> Tensor:
    flat = value.float().flatten(1)
    flat = F.normalize(flat - flat.mean(0), dim=1)
    return F.normalize(flat @ flat.T, dim=1)


def flow(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
    """Relative squared error of the products of two places' channels, summed over positions (Yim et al. 2017 (FSP), equations 1 and 2).

    (student, teacher) at the first and at the second place, [n, channels, ...] each; channels of student and teacher agree.
    """
    ours, theirs = (_flow(*pair) for pair in zip(before, after, strict=True))
    return squared_error(ours, theirs)


def _flow(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.float().flatten(2), b.float().flatten(2)
    if a.shape[2] != b.shape[2]:
        a = F.adaptive_max_pool1d(a, b.shape[2])
    return a @ b.mT / a.shape[2]


def _rows(value: Tensor) -> Tensor:
    """Values as [n, channels], one row for each position."""
    value = value.float()
    return value.flatten(2).transpose(1, 2).flatten(0, 1) if value.ndim >= 4 else value.reshape(-1, value.shape[-1])


def imitation(student: Any, teacher: Any, targets: Any, temperature: float, likeness: str = "soft") -> Tensor:
    """The sum of `imitations`."""
    terms = list(imitations(student, teacher, targets, temperature, likeness).values())
    return sum(terms[1:], terms[0])


def imitations(student: Any, teacher: Any, targets: Any, temperature: float, likeness: str = "soft") -> dict[str, Tensor]:
    """A term for each floating-point output, by its place: soft labels for logits of classes, relative squared error for the rest.

    Logits are outputs so named, and outputs [n, ..., classes] (images: [n, classes, h, w]) for which the targets hold
    integers [n, ...]; another `likeness` of LIKENESSES compares them otherwise. Raises StepError when student and teacher do not give
    the same outputs.
    """
    ours, theirs = (list(_named(value)) for value in (student, teacher))
    if [(name, value.shape) for name, value in ours] != [(name, value.shape) for name, value in theirs]:
        told = f"The student gives {_describe(ours)}, the teacher {_describe(theirs)}."
        raise StepError(told, "the same outputs with the same number of classes")
    if not ours:
        raise StepError("The model's outputs hold no floating-point tensor.", "at least one, such as logits")
    terms = {}
    for (name, value), (_, wanted) in zip(ours, theirs, strict=True):
        own = _of_one(targets, name, len(ours))
        dim = _classes(name, value, own)
        terms[name] = squared_error(value, wanted) if dim is None else _alike(likeness, value, wanted, own, temperature, dim)
    return terms


def _of_one(targets: Any, name: str, count: int) -> Any:
    """The targets of one of several outputs, where they are named or placed as the outputs are; else all of them."""
    if isinstance(targets, Mapping):
        return targets.get(name, targets)
    return targets[int(name)] if isinstance(targets, tuple | list) and name.isdecimal() and len(targets) == count > 1 else targets


def _alike(likeness: str, student: Tensor, teacher: Tensor, targets: Any, temperature: float, dim: int) -> Tensor:
    """How far logits are from the teacher's, by one of LIKENESSES."""
    if likeness == "soft":
        return soft_labels(student, teacher, temperature, dim)
    if likeness == "standardized":
        return soft_labels(standardized(student, dim), standardized(teacher, dim), temperature, dim)
    ours, theirs = (value.movedim(dim, -1).flatten(0, -2) for value in (student, teacher))
    if likeness == "correlated":
        return correlated(ours, theirs, temperature)
    places = student.shape[:dim] + student.shape[dim + 1 :]
    labels = next((target for target in tensors(targets) if not target.is_floating_point() and target.shape == places), None)
    if labels is None:
        raise StepError("Logits without labels cannot be compared decoupled.", "targets that are labels", "another likeness, such as soft")
    return decoupled(ours, theirs, labels.flatten(), temperature)


def _classes(name: str, value: Tensor, targets: Any) -> int | None:
    """The dimension of the classes, or None when the output is not known to be logits."""
    dim = 1 if value.ndim == 4 else value.ndim - 1
    if value.ndim < 2 or value.shape[dim] < 2:
        return None
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
