"""Students cut out of their teacher."""

from __future__ import annotations

from ..errors import StepError
from ..graph import Graph
from ..prune import Blocks, Channels
from ..step import Step
from ..task import Task


def student(graph: Graph, width: float = 0.5, depth: float = 1.0, task: Task | None = None) -> Graph:
    """A copy of a captured teacher with this share of its channels and of its residual blocks, which starts from its weights.

    Blocks that are alike stay evenly spread (Sanh et al. 2019, section 3), channels by what they are worth (`prune.Channels`). With a
    `task` that has calibration data, what is left makes good by least squares. Give it to `compress(task, steps, student=...)`.
    Raises StepError for shares that are not above 0 and at most 1, and for a teacher in which nothing can be cut so.
    """
    for name, share in (("width", width), ("depth", depth)):
        if not 0 < share <= 1:
            raise StepError(f"The student's {name} is {share!r} of the teacher's.", "a share above 0 and at most 1, such as 0.5")
    found, task = graph.copy().requires_grad_(True), task or Task(graph, graph.example()[0])
    steps: list[Step] = [Blocks(ratio=1 - depth, criterion="even")] if depth < 1 else []
    for step in [*steps, Channels(ratio=1 - width)] if width < 1 else steps:
        plan = step.plan(found, task)
        if not plan.changes:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:3])
            raise StepError(f"{step} finds nothing to cut in the teacher: {reasons}.", "blocks and channels that can be cut")
        step.apply(found, plan, task, None)
    return found.eval()
