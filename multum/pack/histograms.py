"""What a coder learns: counts of symbols by context, and what they say of the next symbol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Codes symbols, or as many as asked for when there are none yet, with a model; returns them.
Exchange = Callable[[NDArray[np.int32] | None, int, Any], NDArray[np.int32]]

LOWEST = 6  # octaves below 1 that are told apart
ZERO = 8  # what a decision that is not for zero counts in the prediction
_UNIT, _FINE = 64, 1024  # weight of one seen symbol, and fractions of one in a prior
_MANY = 1 << 19  # symbols in a stream that can fill finer classes of magnitude
_PRIOR, _SHAPE, _OTHERS = 60, 20, 4  # symbols that a prior is worth; of them, and of a neighbour's symbols, in the prior itself
_BELL = 2.0  # width of the bell curve, times the predicted magnitude


class Table:
    """Counts of symbols by context [contexts, K], shared by the tensors of a stream; `values` [K] are what the symbols stand for."""

    def __init__(self, values: Ints, leans: Sequence[float], fine: bool):
        # A model of a single symbol does not exist: a second one is never used.
        self.values = values = np.append(values, values + 1) if values.size == 1 else values
        self.steps, self.leans = 2 if fine else 1, leans
        self.ways = 2 * len(leans) + 2  # a sign and how clear it is, or neither because no neighbour is known
        self.classes = (LOWEST + int(np.abs(values).max()).bit_length() + 1) << self.steps
        # A class more at either end, so that each has neighbours.
        self.counts = np.zeros(((self.classes + 2) * self.ways, values.size), np.int64)
        self.own = np.zeros_like(self.counts)
        part = 1 << self.steps
        widths = np.array([math.ldexp(1 + i % part / part, i // part - LOWEST) for i in range(-1, self.classes + 1)])
        ratio = values / (_BELL * widths[:, None])
        bell = 1 / ((1 + ratio * ratio) * (1 + ratio * ratio))
        self._bell = np.floor(bell * (_SHAPE * _FINE / np.cumsum(bell, 1)[:, -1:])).astype(np.int64)

    def transfer(self, exchange: Exchange, expected: Floats, lean: Floats | None, symbols: Ints | None) -> Ints:
        """Moves symbols of the given predictions through the coder, and learns them."""
        contexts = self._classify(expected, lean)
        order = np.argsort(contexts, kind="stable")
        sizes = np.bincount(contexts)
        present = np.flatnonzero(sizes)
        found, start = np.empty(order.size, np.int64), 0
        for context, size, weights in zip(present, sizes[present], self.weights(present), strict=True):
            at = order[start : start + size]
            model = constriction.stream.model.Categorical(weights, perfect=False)
            part = exchange(None if symbols is None else symbols[at].astype(np.int32), int(size), model)
            self.own[context] += np.bincount(part, minlength=self.values.size)
            found[at] = part
            start += size
        return found

    def _classify(self, expected: Floats, lean: Floats | None) -> NDArray[np.int16]:
        """The context of each symbol, from its predicted magnitude and a signed one."""
        # The bits of a positive double, read as an integer, are a piecewise linear logarithm.
        lowest = (1023 - LOWEST) << self.steps
        context = (expected.view(np.int64) >> (52 - self.steps)).astype(np.int16)
        np.clip(context, lowest, lowest + self.classes - 1, out=context)
        context -= lowest - 1
        context *= self.ways
        if lean is not None:
            context += len(self.leans) + 1
            for limit in self.leans:
                bound = limit * expected
                context += lean > bound
                context -= lean < -bound
        return context

    def contexts(self, octaves: Ints) -> Ints:
        """The contexts of predicted magnitudes alone, given as steps of a logarithm."""
        lowest = -LOWEST << self.steps
        return (np.clip(octaves, lowest, lowest + self.classes - 1) - (lowest - 1)) * self.ways

    def weights(self, contexts: Ints) -> Floats:
        """Weights [contexts, K] of the symbols: seen in this tensor, and a prior from neighbours, other tensors and a bell curve."""
        near = _OTHERS * self.counts[contexts]
        for other in (contexts - self.ways, contexts + self.ways):
            near += self.own[other] + self.counts[other]
        base = near * _FINE + self._bell[contexts // self.ways]
        prior = np.floor(base * (_PRIOR * _UNIT / base.sum(1, keepdims=True)))
        return np.asarray(self.own[contexts] * _UNIT + prior + 1, np.float64)


class Histograms:
    """What is learned from the symbols of a stream.

    ``values`` [K] are what the symbols stand for, ``mean`` is their mean magnitude, ``size`` is the number of symbols to come.
    ``nonzero``, the mean magnitude of those that are not zero, makes two decisions of each symbol; ``bulk`` has tensors coded by bulk.py.
    """

    def __init__(self, values: Ints, mean: float, size: int, nonzero: float | None = None, bulk: bool = False):
        self.values, self.mean, self.nonzero, self.bulk = values, mean, nonzero, bulk
        signed, fine = bool(values.min() < 0 < values.max()), bulk or size >= _MANY
        self.zero = int(np.flatnonzero(values == 0)[0]) if nonzero is not None else -1
        self.table = Table(np.delete(values, self.zero) if nonzero is not None else values, (0.5, 2.0) if signed else (), fine)
        self.flags = Table(np.array([0, ZERO]), (0.5, 1.0) if signed else (), fine) if nonzero is not None else None
        self.magnitudes = np.abs(values if values.size > 1 else np.append(values, values + 1))

    def close(self, mean: float, nonzero: float) -> None:
        """Ends a tensor: what was learned from it helps with the next."""
        self.mean = max(mean, 2.0**-LOWEST)
        self.nonzero = None if self.flags is None else max(nonzero, 1.0)
        for table in (self.table, self.flags):
            if table is not None:
                table.counts += table.own
                table.own[:] = 0
