"""`search` finds the recipe that meets a target; `run` carries out a given one. Both end with the same measurement."""

from __future__ import annotations

from pathlib import Path

from ..errors import TargetError
from ..step import Recipe, check
from ..task import Task
from .evaluate import Tell, Workshop
from .finish import Outcome, finish
from .judge import Judge
from .target import Target
from .walk import Walk


def _quiet(message: str) -> None:
    pass


def search(task: Task, target: Target, out: str | Path, *, workdir: Path | None = None, tell: Tell = _quiet) -> Outcome:
    """The best model that meets the target, or the nearest to it with `met` false; everything about it is written to `out`.

    Walks a ladder of recipes from gentle to strong: builds all of them without their training, which shows their true size in
    seconds; then recovers and measures the gentlest that are small enough. Finished candidates are kept in `workdir` (`out/work`)
    and not repeated. A candidate that fails is recorded. Ctrl-C ends the search with the best so far.
    Raises TargetError for an empty target, TaskError when the task lacks what the target needs.
    """
    if target.empty:
        raise TargetError("The target asks for nothing.", "a size, a speed or a largest drop", "add size='1/10', speed=2 or max_drop=0.5")
    if target.max_drop is not None:
        task.data("validation")
    workshop = Workshop(task, workdir or Path(out) / "work", tell)
    original = workshop.original()
    walk = Walk(workshop, Judge(task, target, original), original)
    stopped = None
    try:
        stopped = walk.run()
    except KeyboardInterrupt:
        if not walk.tried:
            raise
        stopped = "interrupted"
        tell("Stopped. The best so far is measured and written; Ctrl-C again ends at once.")
    return finish(workshop, walk.judge, walk.best, Path(out), candidates=walk.to_data(), stopped=stopped)


def run(task: Task, recipe: Recipe, out: str | Path, *, workdir: Path | None = None, tell: Tell = _quiet) -> Outcome:
    """Carries out one recipe, measures the result and writes everything about it to `out`."""
    check(task, list(recipe.flat()))
    workshop = Workshop(task, workdir or Path(out) / "work", tell)
    original = workshop.original()
    candidate = workshop.measure(workshop.build("the given recipe", recipe), original)
    rows = [candidate.to_data() | {"chosen": True}]
    return finish(workshop, Judge(task, Target(), original), candidate, Path(out), candidates=rows, stopped=None)
