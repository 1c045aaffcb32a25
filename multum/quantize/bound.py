"""How far from the best a rounding can be at most: certified lower bounds on the energy of rows of integers.

With e = s q - w, any d gives E(q) = e (H - D) e' + sum d_i e_i^2, D = diag(d). Between the two integers next to w_i, at errors a_i and b_i,
e_i^2 lies below the line (a_i + b_i) e_i - a_i b_i and meets it at both ends. Where H - D has no negative eigenvalue the rest is convex, so
that the minimum over the box a <= e <= b is no more than the energy of any choice. The best d is that of the semidefinite relaxation
(Poljak, Rendl & Wolkowicz 1995, "A recipe for semidefinite relaxation for (0,1)-quadratic programming"; Billionnet & Elloumi 2007).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import Problem

_ROUNDS = 30  # of d against e
_NEWTON = 8  # steps toward the best d in each of them
_TIGHTEST = 1e-4  # weight of log det(H - D) at the end, in parts of the bound for each input
_DESCENTS = 50  # steps toward the best e for each d


def lower_bound(problem: Problem) -> Tensor:
    """A number below the energy of every choice between the two integers next to each weight [groups, rows].

    Needs memory for a few matrices like H for each row, and time for some hundred factorizations of them.
    """
    two = problem.between()
    H, w, s, low, high = (value.double() for value in (two.H[:, None], two.w, two.s, two.low, two.high))
    a, b = s * low - w, s * high - w
    e, d, gain = torch.zeros_like(w).clamp(a, b), torch.zeros_like(w), torch.zeros_like(w)
    whole = (H.diagonal(dim1=-2, dim2=-1) * (b - a).square()).mean(-1, keepdim=True)
    best = torch.zeros_like(w[..., 0])
    for turn in range(_ROUNDS):
        gain += ((e - a) * (b - e) - gain) / (turn + 1)  # by how much the lines lie above the squares, the mean of all turns
        barrier = whole * max(_TIGHTEST, 0.1 * 0.5**turn)
        d = _weights(H, gain.clamp_min(0) + 3e-3 * (b - a).square().mean(-1, keepdim=True), d, barrier)
        e = _box(H - torch.diag_embed(d), d * (a + b) / 2, a, b, e)
        best = torch.maximum(best, _certified(H - torch.diag_embed(d), d, a, b, e))
    return best


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
        before, e = e, (ahead - ((M @ ahead[..., None])[..., 0] + slope) / length).clamp(a, b)
        quicker = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        ahead, pace = e + (pace - 1) / quicker * (e - before), quicker
    return e


def _certified(M: Tensor, d: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """The relaxation's value can be no less than this: a plane that touches its convex part at e, minimised over the corners of the box."""
    Me = (M @ e[..., None])[..., 0]
    ends = torch.minimum(2 * Me * a + d * a * a, 2 * Me * b + d * b * b)
    return ends.sum(-1) - (Me * e).sum(-1)
