"""The optimal brain surgeon on matrices: what is set to zero is made good by the weights that stay.

The loss is the squared error of the outputs, |W X + E - W' X|^2, where E is what is missing already. Its Hessian is `gram` = X X^T
[groups, inputs, inputs], the same for every row of W [groups, outputs, inputs]; `pull` is E X^T [groups, outputs, inputs]. Functions
on tensors, which compute in double precision and give W in its own type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.matrix import lower_factor

_DAMP = 0.01  # of the mean of the gram's diagonal, added to it
_ITERATIONS, _TOLERANCE = 100, 1e-4  # of conjugate gradients; of the gradient, as a part of what it was
_HASTE = 10  # iterations between two choices of what goes, where only the order of the scores matters


@dataclass(frozen=True)
class Choice:
    """Which weights of a matrix go. `choose` gets the scores [groups, outputs, columns] of all columns, or of some, and the part of
    those to be chosen in the end that go now; it gives True where they go. Columns come in multiples of `unit`.
    """

    choose: Callable[[Tensor, slice, float], Tensor]
    unit: int = 1


def obs(weight: Tensor, gram: Tensor, pull: Tensor, choice: Choice, rounds: int = 8) -> Tensor:
    """In rounds, the cheapest by w^2 / [H^-1]_qq go, the others make good (Hassibi & Stork 1993, section 2; by layer: Dong et al. 2017)."""
    diagonal = inverse(gram).diagonal(dim1=1, dim2=2)[:, None]
    rough, result = (_damped(gram).float(), pull.float()), weight.float()
    for done in range(1, rounds + 1):
        zero = choice.choose(result.double().square() / diagonal, slice(0, weight.shape[2]), done / rounds)
        if done < rounds:
            result = _descended(weight.float(), *rough, zero, result, _HASTE)
    return restored(weight, gram, zero, pull, result)


def sparsegpt(weight: Tensor, gram: Tensor, pull: Tensor, choice: Choice, block: int = 128) -> Tensor:
    """Goes through the columns once; what goes in one is made good by those to its right (Frantar & Alistarh 2023, algorithm 1)."""
    whole, block = inverse(gram), choice.unit * max(1, block // choice.unit)
    work = weight.double() + pull.double() @ whole  # the best weights without zeros: what the algorithm then takes from
    upper = lower_factor(whole).mT
    for begin in range(0, work.shape[2], block):
        end = min(begin + block, work.shape[2])
        here, corner = work[:, :, begin:end], upper[:, begin:end, begin:end]
        zero = choice.choose((here / corner.diagonal(dim1=1, dim2=2)[:, None]).square(), slice(begin, end), 1.0)
        errors = torch.zeros_like(here)
        for column in range(end - begin):
            errors[:, :, column] = here[:, :, column].masked_fill(~zero[:, :, column], 0) / corner[:, column, column, None]
            here[:, :, column:] -= errors[:, :, column, None] * corner[:, None, column, column:]
        here.masked_fill_(zero, 0)
        work[:, :, end:] -= errors @ upper[:, begin:end, end:]
    return work.to(weight.dtype)


SURGEONS: dict[str, Callable[[Tensor, Tensor, Tensor, Choice], Tensor]] = {"obs": obs, "sparsegpt": sparsegpt}


def restored(weight: Tensor, gram: Tensor, zero: Tensor, pull: Tensor, start: Tensor | None = None) -> Tensor:
    """Zeros where `zero` is True; the other weights as they lose least, the optimum for this mask, sought from `start` on.

    The damping draws toward the weights as they were.
    """
    begin = weight.double() if start is None else start.double()
    return _descended(weight.double(), _damped(gram), pull, zero, begin, _ITERATIONS).to(weight.dtype)


def _descended(old: Tensor, gram: Tensor, pull: Tensor, zero: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients for all rows at once, preconditioned by the diagonal."""
    kept, diagonal = ~zero, gram.diagonal(dim1=1, dim2=2)[:, None]
    enough = _TOLERANCE**2 * _power(((old * zero) @ gram + pull) * kept, diagonal)
    new = start * kept
    residual = ((old - new) @ gram + pull) * kept
    direction, power = residual / diagonal, _power(residual, diagonal)
    for _ in range(iterations):
        if (power <= enough).all():
            break
        pushed = (direction @ gram) * kept
        step = power / (direction * pushed).sum(2, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
        new, residual = new + step * direction, residual - step * pushed
        before, power = power, _power(residual, diagonal)
        direction = residual / diagonal + power / before.clamp_min(torch.finfo(power.dtype).tiny) * direction
    return new


def _power(residual: Tensor, diagonal: Tensor) -> Tensor:
    return (residual.square() / diagonal).sum(2, keepdim=True)


def shrunk(gram: Tensor, pull: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums over `count` columns, drawn the nearer to a diagonal gram and to no pull the fewer columns there are for so many inputs.

    A gram of fewer columns than inputs says that most directions cost nothing: on other data they do. A linear classifier behind pooled
    images has a column for each image (cf. Ledoit & Wolf 2004, section 2; with a fixed weight, inputs over inputs plus columns).
    """
    share = gram.shape[1] / (gram.shape[1] + count)
    return (1 - share) * gram + share * torch.diag_embed(gram.diagonal(dim1=1, dim2=2)), (1 - share) * pull


def inverse(gram: Tensor) -> Tensor:
    """The inverse of a damped gram. Raises StepError when it is not finite."""
    return torch.cholesky_inverse(lower_factor(_damped(gram)))


def _damped(gram: Tensor) -> Tensor:
    """A gram with a damped diagonal, in double precision; inputs that are always zero stand alone."""
    gram = gram.double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp_min(1e-30)
    return gram + torch.diag_embed(_DAMP * mean + (diagonal == 0) * mean)
