"""Rounding as energy minimisation: which integers disturb the outputs of a layer least.

A row w of a weight meets inputs x. With integers q its outputs err by (s q - w) x, whose mean square over the data is the energy

    E(q) = (s q - w) H (s q - w)',    H = mean of x x'

With q = floor(w / s) + z, z in {0, 1}, that is a QUBO, the energy of an Ising model; rounding to nearest minimises it only when H is
diagonal. Shapes: w, s, q are [groups, rows, inputs], H is [groups, inputs, inputs]; the rows of a group share their H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..graph.matrix import lower_factor

_BLOCK = 64  # columns whose changes are gathered before the rest of the row hears of them
_WIDTH = 64  # partial rows that are kept
_SWEEPS = 10  # of annealing
_HOTTEST, _COLDEST = 1.0, 0.01  # temperatures, in units of the energy of nearest rounding for each input
_DESCENTS = 20  # sweeps without noise at the most
_STEPS, _RATE = 600, 0.02  # of learned rounding
_STRETCH = (-0.1, 1.1)  # of the sigmoid, so that it reaches 0 and 1 (Louizos et al. 2018)


@dataclass(frozen=True)
class Problem:
    """Rows to round: weights `w`, distances `s` between integers, `H`, and the lowest and highest integers (all of w's shape)."""

    w: Tensor
    s: Tensor
    H: Tensor
    low: Tensor
    high: Tensor

    def energy(self, q: Tensor) -> Tensor:
        """E of each row [groups, rows]."""
        error = self.s * q - self.w
        return ((error @ self.H) * error).sum(-1)

    def between(self) -> Problem:
        """The same with two choices for each weight, the integers next to it: the QUBO."""
        below = torch.floor(self.w / self.s)
        return replace(self, low=clip(below, self.low, self.high), high=clip(below + 1, self.low, self.high))


def clip(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(q, low), high)


def nearest(problem: Problem) -> Tensor:
    """The integers next to each weight, whatever the inputs."""
    return clip(torch.round(problem.w / problem.s), problem.low, problem.high)


def gptq(problem: Problem, width: int = 1) -> Tensor:
    """One column after the other is rounded, and what it errs is made up for by those that are still free, the most active first.

    Frantar et al. 2023, "GPTQ", section 3; in the language of lattices, Babai's nearest plane. With a `width` the best partial rows
    are kept at each column instead of the best one (K-best decoding, Guo & Nilsson 2006).
    """
    order = problem.H.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)[:, None, None]
    w, s, low, high = (torch.take_along_dim(x[:, :, None], order, -1) for x in (problem.w, problem.s, problem.low, problem.high))
    H = torch.take_along_dim(torch.take_along_dim(problem.H, order[:, 0], -1), order[:, 0].mT, -2)
    upper = inverse_factor(H)[:, None]
    best = (_narrow if width == 1 else _wide)(w, s, low, high, upper, width)
    return best.scatter(-1, order[:, 0].expand_as(best), best)


def inverse_factor(H: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of a damped H [groups, n, n], of the same shape. Raises StepError as `lower_factor`."""
    return lower_factor(torch.cholesky_inverse(lower_factor(H))).mT.to(H.dtype)


def _narrow(w: Tensor, s: Tensor, low: Tensor, high: Tensor, upper: Tensor, width: int) -> Tensor:
    """The integers of columns that are in order [groups, rows, inputs]."""
    w, s, low, high, upper = (x.squeeze(2).mT.contiguous() if x is not upper else x[:, 0] for x in (w, s, low, high, upper))
    q = torch.empty_like(w)  # [groups, inputs, rows]
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            q[:, j] = (w[:, j] / s[:, j]).round_().clamp_(low[:, j], high[:, j])
            errors[:, j - start] = (w[:, j] - s[:, j] * q[:, j]) / upper[:, j, j, None]
            w[:, j + 1 : stop].baddbmm_(upper[:, j, j + 1 : stop, None], errors[:, j - start, None], alpha=-1)
        w[:, stop:].baddbmm_(upper[:, start:stop, stop:].mT, errors, alpha=-1)
    return q.mT


def _wide(w: Tensor, s: Tensor, low: Tensor, high: Tensor, upper: Tensor, width: int) -> Tensor:
    """The same with `width` partial rows kept at each column [groups, rows, kept, inputs]."""
    q, cost = torch.empty_like(w), torch.zeros_like(w[..., 0])  # [groups, rows, kept, inputs], and the energy so far [groups, rows, kept]
    for start in range(0, w.shape[-1], _BLOCK):
        block = slice(start, min(start + _BLOCK, w.shape[-1]))
        own, chosen, errors = w[..., block], torch.zeros_like(w[..., block]), torch.zeros_like(w[..., block])
        origin = torch.arange(w.shape[2], device=w.device).expand(cost.shape)
        for i, j in enumerate(range(block.start, block.stop)):
            below = torch.floor(own[..., i] / s[..., j])
            levels = clip(torch.cat([below, below + 1], -1), low[..., j], high[..., j])
            error = (torch.cat([own[..., i]] * 2, -1) - s[..., j] * levels) / upper[..., j, j, None]
            total = torch.cat([cost] * 2, -1) + error.square()
            twin = levels[..., below.shape[-1] :] == levels[..., : below.shape[-1]]  # where both were clipped
            total[..., below.shape[-1] :].masked_fill_(twin, torch.inf)
            cost, best = total.topk(min(width, total.shape[-1]), -1, largest=False)
            parent, error = best % below.shape[-1], error.gather(-1, best)
            origin = origin.gather(-1, parent)
            own, chosen, errors = (torch.take_along_dim(x, parent[..., None], 2) for x in (own, chosen, errors))
            chosen[..., i], errors[..., i] = levels.gather(-1, best), error
            own[..., i:] -= error[..., None] * upper[..., j, None, j : block.stop]
        q, w = (torch.take_along_dim(x, origin[..., None], 2) for x in (q, w))
        q[..., block] = chosen
        w[..., block.stop :] -= errors @ upper[..., block, block.stop :]
    return q[:, :, 0]


def sweep(problem: Problem, q: Tensor, heat: Tensor | None = None, random: torch.Generator | None = None) -> Tensor:
    """Every weight in turn moves to the best integer for it, given all others; the energy never rises.

    With `heat` [groups, rows], a temperature, it takes one of the two best at random, as they would be found in thermal equilibrium.
    """
    q, s, H = q.clone(), problem.s, problem.H
    slope = (s * q - problem.w) @ H
    for start in range(0, q.shape[-1], _BLOCK):
        block = slice(start, min(start + _BLOCK, q.shape[-1]))
        own, within, moves = slope[..., block].clone(), H[:, block, block], torch.zeros_like(q[..., block])
        for i, j in enumerate(range(block.start, block.stop)):
            stiffness = within[:, None, i, i] * s[..., j]
            best = q[..., j] - own[..., i] / stiffness
            if heat is None:
                new = torch.round(best)
            else:
                new = torch.floor(best)
                rise = stiffness * s[..., j] * (1 - 2 * (best - new))  # in energy, of the integer above over the one below
                new += torch.rand(new.shape, generator=random, device=new.device) < torch.sigmoid(-rise / heat)
            new = clip(new, problem.low[..., j], problem.high[..., j])
            moves[..., i] = s[..., j] * (new - q[..., j])
            own += moves[..., i, None] * within[:, None, i]
            q[..., j] = new
        slope[..., block.stop :] += moves @ H[:, block, block.stop :]
    return q


def descend(problem: Problem, q: Tensor) -> Tensor:
    """Sweeps until no weight moves: no single change lowers the energy any more."""
    for _ in range(_DESCENTS):
        before, q = q, sweep(problem, q)
        if torch.equal(before, q):
            break
    return q


def anneal(problem: Problem, sweeps: int = _SWEEPS, seed: int = 0) -> Tensor:
    """Descends from the nearest integers and those of GPTQ, heats the best and cools it slowly; the best of each row.

    Kirkpatrick et al. 1983, "Optimization by simulated annealing"; single moves are drawn as by Geman & Geman 1984.
    """
    random = torch.Generator(problem.w.device).manual_seed(seed)
    plain = nearest(problem)
    best = plain
    for start in (plain, gptq(problem), gptq(problem, _WIDTH)):  # where the grid clips much, the widest need not be the best
        best = better(problem, best, descend(problem, start))
    unit, q = problem.energy(plain).clamp_min(torch.finfo(plain.dtype).tiny) / plain.shape[-1], best
    for step in range(sweeps):
        q = sweep(problem, q, unit * _HOTTEST * (_COLDEST / _HOTTEST) ** (step / max(1, sweeps - 1)), random)
    return better(problem, best, descend(problem, q))


def better(problem: Problem, a: Tensor, b: Tensor) -> Tensor:
    """Row by row the integers with less energy."""
    return torch.where((problem.energy(b) < problem.energy(a))[..., None], b, a)


def learned(problem: Problem, steps: int = _STEPS) -> Tensor:
    """Up or down is learned by gradient descent on a relaxation, which a penalty drives to whole decisions.

    Nagel et al. 2020, "Up or down?" (AdaRound), section 3.3, with the outputs' error taken over all data at once.
    """
    problem = problem.between()
    low, (bottom, top) = problem.low, _STRETCH
    part = clip(problem.w / problem.s - low, torch.zeros_like(low), torch.ones_like(low))
    with torch.inference_mode(False), torch.enable_grad():
        logit = torch.logit((part.clone() - bottom) / (top - bottom)).requires_grad_()
        optimizer, unit = torch.optim.Adam([logit], _RATE), problem.energy(nearest(problem)).sum().clone()
        for step in range(steps):
            soft = (torch.sigmoid(logit) * (top - bottom) + bottom).clamp(0, 1)
            progress = max(0.0, step / steps - 0.2) / 0.8
            sharpness = 2 + 18 * (1 - progress)
            undecided = (1 - (2 * soft - 1).abs() ** sharpness).sum() / soft.numel()
            loss = problem.energy(low + soft).sum() / unit + (step >= 0.2 * steps) * undecided
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        soft = torch.sigmoid(logit.detach()) * (top - bottom) + bottom
    return clip(low + (soft >= 0.5).to(low), problem.low, problem.high)


ROUNDINGS: dict[str, Callable[[Problem], Tensor]] = {"nearest": nearest, "gptq": gptq, "adaround": learned, "energy": anneal}
