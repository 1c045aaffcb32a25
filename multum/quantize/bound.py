"""How far from the best a rounding can be at most: certified lower bounds on the energy of rows of integers.

With e = s q - w, any d gives E(q) = e (H - D) e' + sum d_i e_i^2, D = diag(d). Between the two integers next to w_i, at errors a_i and b_i,
e_i^2 lies below the line (a_i + b_i) e_i - a_i b_i and meets it at both ends. Where H - D has no negative eigenvalue the rest is convex, so
that the minimum over the box a <= e <= b is no more than the energy of any choice. The best d is that of the semidefinite relaxation
(Poljak, Rendl & Wolkowicz 1995, "A recipe for semidefinite relaxation for (0,1)-quadratic programming"; Billionnet & Elloumi 2007).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import Problem, nearest

_ROUNDS = 30  # of d against e
_NEWTON = 8  # steps toward the best d in each of them
_TIGHTEST = 1e-4  # weight of log det(H - D) at the end, in parts of the bound for each input
_DESCENTS = 50  # steps toward the best e for each d
_AT_ONCE = 256  # boxes that are halved together


def lower_bound(problem: Problem) -> Tensor:
    """A number below the energy of every choice between the two integers next to each weight [groups, rows].

    Needs memory for a few matrices like H for each row, and time for some hundred factorizations of them.
    """
    return _relaxed(problem)[0]


def certify(problem: Problem, q: Tensor, gap: float = 0.01, most: int = 20_000) -> Tensor:
    """The same, raised by branch and bound until it tells of integers q that they are within `gap` of the best [groups, rows].

    The gap is (energy of q - bound) / (energy of nearest - bound). Weights are fixed one after the other, to either integer, first the one
    for which the relaxation is loosest, in the box with the lowest bound; no row looks at more than `most` boxes.
    """
    two = problem.between()
    bounds, d = _relaxed(problem)
    found, plain = (two.energy(x).double() for x in (q, nearest(two)))
    aims = torch.minimum(found, (found - gap * plain) / (1 - gap))
    for group, row in (bounds < aims).nonzero().tolist():
        w, s, low, high = (value[group, row].double() for value in (two.w, two.s, two.low, two.high))
        ends = s * low - w, s * high - w
        bounds[group, row] = _branch(two.H[group].double(), d[group, row], ends, float(bounds[group, row]), float(aims[group, row]), most)
    return bounds


def _branch(H: Tensor, d: Tensor, ends: tuple[Tensor, Tensor], bound: float, aim: float, most: int) -> float:
    """The lowest bound of a row's boxes when they have been halved until all are above `aim`, or there were too many."""
    M = H - torch.diag(d)
    a, b = (end[None] for end in ends)
    e, bounds, looked = (a + b) / 2, torch.tensor([bound], dtype=H.dtype), 0
    while len(bounds) and looked < most:
        order = bounds.argsort()
        a, b, e, bounds = (value[order] for value in (a, b, e, bounds))
        first = slice(0, _AT_ONCE)
        x = _box(M, d * (a[first] + b[first]) / 2, a[first], b[first], e[first])
        widest = (d.abs() * (x - a[first]) * (b[first] - x) + 1e-9 * (b[first] - a[first])).argmax(-1, keepdim=True)
        below, above = b[first].scatter(1, widest, a[first].gather(1, widest)), a[first].scatter(1, widest, b[first].gather(1, widest))
        a, b = torch.cat([a[first], above, a[_AT_ONCE:]]), torch.cat([below, b[first], b[_AT_ONCE:]])
        half = 2 * len(x)
        own = _box(M, d * (a[:half] + b[:half]) / 2, a[:half], b[:half], torch.cat([x, x]).clamp(a[:half], b[:half]))
        new = torch.maximum(_certified(M, d, a[:half], b[:half], own), torch.cat([bounds[first]] * 2))
        e, bounds, looked = torch.cat([own, e[_AT_ONCE:]]), torch.cat([new, bounds[_AT_ONCE:]]), looked + half
        open_ = (bounds < aim) & (a < b).any(1)
        closed = bounds[(bounds < aim) & ~(a < b).any(1)]  # all weights are fixed: a choice, and better than q
        if len(closed):
            aim = min(aim, float(closed.min()))
        a, b, e, bounds = (value[open_ & (bounds < aim)] for value in (a, b, e, bounds))
    return min(aim, float(bounds.min())) if len(bounds) else aim


def _relaxed(problem: Problem) -> tuple[Tensor, Tensor]:
    """The bound [groups, rows], and the d that gave it [groups, rows, inputs]."""
    two = problem.between()
    H, w, s, low, high = (value.double() for value in (two.H[:, None], two.w, two.s, two.low, two.high))
    a, b = s * low - w, s * high - w
    e, d, gain = torch.zeros_like(w).clamp(a, b), torch.zeros_like(w), torch.zeros_like(w)
    whole = (H.diagonal(dim1=-2, dim2=-1) * (b - a).square()).mean(-1, keepdim=True)
    best, kept = torch.zeros_like(w[..., 0]), d
    for turn in range(_ROUNDS):
        gain += ((e - a) * (b - e) - gain) / (turn + 1)  # by how much the lines lie above the squares, the mean of all turns
        barrier = whole * max(_TIGHTEST, 0.1 * 0.5**turn)
        d = _weights(H, gain.clamp_min(0) + 3e-3 * (b - a).square().mean(-1, keepdim=True), d, barrier)
        e = _box(H - torch.diag_embed(d), d * (a + b) / 2, a, b, e)
        bound = _certified(H - torch.diag_embed(d), d, a, b, e)
        kept, best = torch.where((bound > best)[..., None], d, kept), torch.maximum(best, bound)
    return best, kept


def _weights(H: Tensor, gain: Tensor, d: Tensor, barrier: Tensor) -> Tensor:
    """The d that maximises <gain, d> + barrier log det(H - D), by Newton's method, from one where H - D is positive definite."""
    for _ in range(_NEWTON):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H - torch.diag_embed(d)))
        slope = gain / barrier - inverse.diagonal(dim1=-2, dim2=-1)
        step = torch.linalg.solve(inverse.square(), slope[..., None])[..., 0]
        decrement = (slope * step).sum(-1, keepdim=True).clamp_min(0).sqrt()
        d = d + step / (1 + decrement)  # stays where H - D is positive definite: the function is self-concordant
    return d


def _box(M: Tensor, slope: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """Close to the e in the box a..b with the least e M e' + 2 <slope, e> (accelerated projected gradients)."""
    length = torch.linalg.matrix_norm(M, float("inf"))[..., None]
    ahead, pace = e, 1.0
    for _ in range(_DESCENTS):
        before, e = e, (ahead - ((ahead[..., None, :] @ M)[..., 0, :] + slope) / length).clamp(a, b)
        quicker = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        ahead, pace = e + (pace - 1) / quicker * (e - before), quicker
    return e


def _certified(M: Tensor, d: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """The relaxation's value can be no less than this: a plane that touches its convex part at e, minimised over the corners of the box."""
    Me = (e[..., None, :] @ M)[..., 0, :]
    ends = torch.minimum(2 * Me * a + d * a * a, 2 * Me * b + d * b * b)
    return ends.sum(-1) - (Me * e).sum(-1)
