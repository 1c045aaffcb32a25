"""What the teacher said of each sample, kept for passes to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..task import batch_size, tensors

_ROW = 300  # bytes beside the tensors that a sample takes
_FIRST = 1024  # samples for which there is room at first


class Memory:
    """Answers [n, ...] to batches of inputs [n, ...], sample by sample, in `limit` bytes; only samples not seen before are asked for.

    A sample is known by 128 bits of a hash of its inputs, whatever batch it comes in. Data that are never the same twice fill the memory,
    which is then given up. An answer that was computed in another batch may differ in the last bits.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.places: dict[tuple[int, ...], int] = {}
        self.rows: list[Tensor] = []
        self.used = False
        self.factors: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, inputs: Any, ask: Callable[[Any], list[Tensor]]) -> list[Tensor]:
        """The answers to these inputs, by `ask` where they are not known."""
        size = batch_size(inputs)
        if self.limit <= 0 or not all(leaf.ndim and len(leaf) == size for leaf in tensors(inputs)):
            return ask(inputs)
        keys = self._keys(inputs, size)
        missing = [row for row, key in enumerate(keys) if key not in self.places]
        known = [row for row, key in enumerate(keys) if key in self.places]
        places = [self.places[keys[row]] for row in known]
        answers = ask(inputs if not known else picked(inputs, missing)) if missing else []
        if any(not leaf.ndim or len(leaf) != len(missing) for leaf in answers):  # they say nothing of single samples
            self._give_up()
            return answers if not known else ask(inputs)
        device = next(tensors(inputs)).device
        before = [rows[places].to(device, non_blocking=True) for rows in self.rows] if known else []
        if missing:
            self._keep([keys[row] for row in missing], answers)
        self.used = self.used or bool(known)
        if not known or not missing:
            return answers or before
        return [torch.cat([one, other])[_inverse(known + missing)] for one, other in zip(before, answers, strict=True)]

    def _keep(self, keys: Sequence[tuple[int, ...]], answers: Sequence[Tensor]) -> None:
        cost = sum(leaf[0].nbytes for leaf in answers) + _ROW
        room = max(0, int(self.limit // cost) - len(self.places))
        fresh = list({key: row for row, key in enumerate(keys)}.items())[:room]
        end = len(self.places) + len(fresh)
        if not fresh:
            if not self.used:
                self._give_up()
            return
        if not self.rows or end > len(self.rows[0]):
            length = min(max(end, _FIRST, 2 * len(self.places)), int(self.limit // cost))
            grown = [leaf.new_empty((length, *leaf.shape[1:]), device="cpu") for leaf in answers]
            for new, old in zip(grown, self.rows, strict=False):
                new[: len(self.places)] = old[: len(self.places)]
            self.rows = grown
        for rows, leaf in zip(self.rows, answers, strict=True):
            rows[len(self.places) : end] = leaf[[row for _, row in fresh]].cpu()
        self.places |= {key: len(self.places) + index for index, (key, _) in enumerate(fresh)}

    def _give_up(self) -> None:
        self.limit, self.places, self.rows = 0, {}, []

    def _keys(self, inputs: Any, size: int) -> list[tuple[int, ...]]:
        """Two sums of each sample's words times random odd numbers, modulo 2 to the 64th."""
        total = torch.zeros(())
        for order, leaf in enumerate(tensors(inputs)):
            bits = leaf.detach().contiguous().reshape(size, -1)
            words = bits.view(torch.int32 if bits.element_size() % 4 == 0 else torch.uint8).long()
            total = total + (words[:, None] * self._factors(order, words)).sum(2)
        return [tuple(key) for key in total.tolist()]

    def _factors(self, order: int, words: Tensor) -> Tensor:
        if (found := self.factors.get((order, words.device))) is None or found.shape[1] < words.shape[1]:
            random = torch.Generator().manual_seed(order)
            found = torch.randint(-(2**62), 2**62, (2, words.shape[1]), generator=random) * 2 + 1
            self.factors[order, words.device] = found = found.to(words.device)
        return found[:, : words.shape[1]]


def picked(value: Any, rows: list[int] | Tensor) -> Any:
    """These samples of a nested value [n, ...]."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {key: picked(part, rows) for key, part in value.items()}
    return type(value)(picked(part, rows) for part in value) if isinstance(value, tuple | list) else value


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
