"""What a training shows in TensorBoard while it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainError
from ..graph import Graph

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
_board: ContextVar[Board | None] = ContextVar("board", default=None)


@contextmanager
def shown(folder: str | Path | None) -> Iterator[None]:
    """Inside, every training writes its loss, its terms, scores, rate and histograms of its weights into a folder of its own in `folder`.

    Raises TrainError when TensorBoard is not installed.
    """
    if folder is not None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            told = "python -m pip install 'multum[tensorboard]'"
            raise TrainError("TensorBoard is not installed.", "the package tensorboard", told) from error
    token = _folder.set(None if folder is None else Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


def note(term: str, value: Tensor) -> None:
    """A term of the loss [] at the present step."""
    if (board := _board.get()) is not None and board.writer is not None:
        board.terms.setdefault(term, []).append(value.detach())


class Board:
    """The curves of one training; without a folder it does nothing. Values are read from the device now and then only."""

    def __init__(self) -> None:
        self.writer: Any = None
        folder, self.terms = _folder.get(), dict[str, list[Tensor]]()
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / f"{sum(1 for _ in folder.glob('*')) + 1:02d}"))
        _board.set(self)

    def scalars(self, step: int, **values: float) -> None:
        if self.writer is not None:
            means = {f"loss/{term}": float(torch.stack(found).mean()) for term, found in self.terms.items()}
            self.terms.clear()
            for name, value in (values | means).items():
                self.writer.add_scalar(name, value, step)

    def histograms(self, step: int, graph: Graph) -> None:
        if self.writer is not None:
            for name, value in graph.tensors.named_parameters():
                self.writer.add_histogram(name, value.detach().float().cpu(), step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        _board.set(None)
