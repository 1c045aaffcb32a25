"""What a measured difference proves: paired comparison of scores, agreement of outputs, and the interval of a median."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from multum.errors import MultumError

Scores = npt.NDArray[np.float64]

_Z95 = NormalDist().inv_cdf(0.95)
_MANY = 1000  # degrees of freedom from which Student's t is the normal to three digits


@dataclass(frozen=True)
class Drop:
    """What was lost, in the metric's unit; negative: won.

    ``bound``: with 95 % confidence the true drop is no larger (one-sided). ``p``: two-sided, that there is no difference.
    ``discordant``: of ``n`` samples, those whose score changed. All three are None for a metric that is a single number.
    """

    points: float
    bound: float | None
    p: float | None
    n: int
    discordant: int | None


def compare(before: npt.ArrayLike, after: npt.ArrayLike, higher_is_better: bool = True) -> Drop:
    """The drop from ``before`` to ``after``: scores of the same samples in the same order [n], or single numbers.

    Two-valued scores (right or wrong) give McNemar's test, exact below 25 discordant samples; others the paired t test.
    Raises ``MultumError`` for scores that are not finite or do not pair.
    """
    a, b = _scores(before, "before"), _scores(after, "after")
    if a.shape != b.shape:
        raise MultumError(
            f"Scores of shapes {list(a.shape)} and {list(b.shape)} are to be compared.", "one score per sample, of the same samples"
        )
    loss = a - b if higher_is_better else b - a
    points = float(loss.mean())
    if a.ndim == 0:
        return Drop(points, None, None, 1, None)
    discordant = int(np.count_nonzero(loss))
    values = np.unique(np.concatenate([a, b]))
    if len(values) <= 2:
        unit = float(values[-1] - values[0] if len(values) == 2 else abs(values[0]))
        return Drop(points, _two_valued_bound(points, unit, loss.size, discordant), _mcnemar(loss), loss.size, discordant)
    if loss.size < 2:
        return Drop(points, None, None, 1, discordant)
    error, freedom = float(loss.std(ddof=1)) / math.sqrt(loss.size), loss.size - 1
    p = _student_two_sided(abs(points) / error, freedom) if error else float(discordant == 0)
    return Drop(points, points + _student_95(freedom) * error, p, loss.size, discordant)


def agreement(a: Any, b: Any, axis: int = -1) -> float:
    """In how many of 100 cases two models choose the same class.

    The logits are the first floating tensor of each output, with the classes along ``axis``; every other position is a case.
    """
    x, y = _logits(a), _logits(b)
    if x.shape != y.shape or x.ndim < 2 or x.shape[axis] < 2 or not x.size:
        raise MultumError(
            f"Outputs of shapes {list(x.shape)} and {list(y.shape)} are to be compared.", "logits of the same shape, [n, 2 classes or more]"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise MultumError("The outputs hold NaN or infinity.", "finite logits", "check the model and its inputs")
    return 100 * float((x.argmax(axis) == y.argmax(axis)).mean())


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """A two-sided interval of the median from order statistics, whatever the distribution; None when there are too few values for it."""
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0  # the interval leaves out `rank` values at each end
    while (tail := tail + math.comb(n, rank) / 2**n) <= (1 - confidence) / 2:
        rank += 1
    return (ordered[rank - 1], ordered[n - rank]) if rank else None


def _scores(values: npt.ArrayLike, name: str) -> Scores:
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, np.float64)
    if array.ndim > 1 or not array.size:
        raise MultumError(f"The scores {name} have the shape {list(array.shape)}.", "one score per sample [n], or a single number")
    if bad := int(np.count_nonzero(~np.isfinite(array))):
        raise MultumError(
            f"{bad} of {array.size} scores {name} are NaN or infinite.", "finite scores", "check the model's outputs and the metric"
        )
    return array


def _two_valued_bound(points: float, unit: float, n: int, discordant: int) -> float:
    """The variance of a paired difference of shares is (discordant - drop^2) / n. Without a discordant sample that says nothing:
    then the share of discordant samples that n samples miss with a probability of 5 %."""
    if not discordant:
        return unit * (1 - math.pow(0.05, 1 / n))
    return points + unit * _Z95 * math.sqrt(max(0.0, discordant / n - (points / unit) ** 2) / n)


def _mcnemar(loss: Scores) -> float:
    """McNemar (1947): are losses and gains equally frequent?"""
    lost, won = int((loss > 0).sum()), int((loss < 0).sum())
    if (n := lost + won) < 25:
        one_sided: float = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
        return min(1.0, 2 * one_sided)
    return math.erfc(max(0, abs(lost - won) - 1) / math.sqrt(2 * n))  # the chi-square statistic's root, with continuity correction


def _student_two_sided(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    if freedom > _MANY:
        return math.erfc(t / math.sqrt(2))
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    total = term = float(freedom > 1) * (math.cos(angle) if odd else 1.0)
    for k in range(1 + odd, freedom - 2, 2):
        term *= square * k / (k + 1)
        total += term
    return 1 - (2 / math.pi * (angle + sine * total) if odd else sine * total)


def _student_95(freedom: int) -> float:
    """The 95 % quantile of Student's distribution, by bisection."""
    low, high = _Z95, 7.0  # 6.31 at one degree of freedom
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_two_sided(middle, freedom) > 0.1 else (low, middle)
    return high


def _logits(outputs: Any) -> npt.NDArray[Any]:
    found = _first_floating(outputs)
    if found is None:
        raise MultumError(f"The output, a {type(outputs).__name__}, holds no floating tensor.", "logits")
    return found


def _first_floating(outputs: Any) -> npt.NDArray[Any] | None:
    if isinstance(outputs, torch.Tensor):
        return outputs.detach().cpu().double().numpy() if outputs.is_floating_point() else None
    if isinstance(outputs, np.ndarray):
        return outputs if outputs.dtype.kind == "f" else None
    children = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple | list) else ()
    return next((found for child in children if (found := _first_floating(child)) is not None), None)
