"""What goes along with a training and has a say at every step: a penalty, a constraint, a schedule."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from ..graph import Graph


class Companion:
    """By itself it does nothing; each method may be overridden.

    `key` tells two companions with different options apart, so that a checkpoint is not resumed with others.
    """

    key: str = ""

    def view(self, inputs: Any) -> Any:
        """What the network is given in place of a batch of inputs; the loss gets the batch as it came."""
        return inputs

    def judged(self) -> AbstractContextManager[None]:
        """Inside, the graph is what is judged, and kept when it is the best."""
        return nullcontext()

    def join(self, graph: Graph) -> None:
        """Called once, with the graph that trains, on its device."""

    def before(self, step: int, steps: int) -> None:
        """Called before step number `step` of `steps`, counted from zero."""

    def term(self) -> Tensor | float:
        """What is added to the loss of a step, []."""
        return 0.0

    def after(self, step: int, steps: int) -> None:
        """Called without gradients after the optimizer's step; the gradients of the loss are still there."""

    def met(self) -> bool:
        """Whether the present state may be the result; until then no state is judged by its score."""
        return True

    def measured(self) -> dict[str, Any]:
        """What it says of the training in the end."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
