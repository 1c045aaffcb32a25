"""One noun, one verb: a `Step` is a compression method, `compress` applies steps to a task. Read this first."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from .errors import StepError, near
from .graph import Graph, capture
from .graph.file import dump, restore
from .graph.sparse import zeros_kept
from .task import Task

# The folders that hold methods. A method is a class in one of them, named in its `__all__`.
FAMILIES = ("prune", "factorize", "share", "lighten", "quantize", "distill")


class Stage(IntEnum):
    """Shapes are changed before weights, weights before number formats."""

    STRUCTURE = 1
    VALUES = 2
    NUMBERS = 3


@dataclass(frozen=True)
class Plan:
    """What a step will do: plain data for each layer that changes, and the reason for each that does not."""

    changes: dict[str, dict[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A compression method; its fields are its options, each with a default that is sensible on an unknown model."""

    stage: ClassVar[Stage | None] = None  # None: training, which fits anywhere
    needs: ClassVar[tuple[str, ...]] = ()  # what of the task it uses: "train", "calibration", "loss", ...

    def plan(self, graph: Graph, task: Task) -> Plan:
        """Decides. Changes neither graph nor task."""
        raise NotImplementedError

    def apply(self, graph: Graph, plan: Plan, task: Task, workdir: Path | None) -> dict[str, Any]:
        """Does to the graph what the plan says; returns what it measured. Long work is kept in `workdir`, to resume."""
        raise NotImplementedError

    def requires(self) -> tuple[str, ...]:
        """What of the task it uses with these options."""
        return self.needs

    @classmethod
    def name(cls) -> str:
        """The name in recipes and on the command line, such as `prune.Channels`."""
        return ".".join([*cls.__module__.split(".")[-2:-1], cls.__name__])

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def __str__(self) -> str:
        return f"{self.name()}({', '.join(f'{key}={value!r}' for key, value in self.options().items())})"


def option(default: Any, text: str) -> Any:
    """A field of a step: its default, and the line that `multum steps` and `--help` show."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """Steps in order. A recipe may stand wherever a step may."""

    steps: tuple[Step | Recipe, ...]

    def __init__(self, steps: Sequence[Step | Recipe]):
        object.__setattr__(self, "steps", tuple(steps))

    def flat(self) -> Iterator[Step]:
        for step in self.steps:
            if isinstance(step, Recipe):
                yield from step.flat()
            else:
                yield step

    def to_data(self) -> list[Any]:
        """A list of step names, or of `{name: options}`: what stands in a YAML recipe."""
        return [{step.name(): _plain(step.options())} if step.options() else step.name() for step in self.flat()]

    @classmethod
    def from_data(cls, data: Any) -> Recipe:
        """The inverse of `to_data`. Raises StepError for unknown steps and options, with the near misses."""
        if not isinstance(data, list) or not data:
            raise StepError(f"A recipe is a {type(data).__name__}.", "a list of steps, such as\n- prune.Channels: {ratio: 0.5}")
        return cls([_step(row) for row in data])

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise StepError(f"The recipe {str(path)!r} cannot be read: {error}", "a YAML list of steps") from error
        return cls.from_data(data)

    def save(self, path: str | Path) -> None:
        """Writes the recipe as YAML."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_data(), sort_keys=False))

    def __str__(self) -> str:
        return " > ".join(str(step) for step in self.flat())


@dataclass(frozen=True)
class Record:
    """What one step did."""

    step: str
    options: dict[str, Any]
    changes: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    parameters: tuple[int, int]
    seconds: float
    measured: dict[str, Any]

    def to_data(self) -> dict[str, Any]:
        return dict(_plain(asdict(self)))


@dataclass(frozen=True, eq=False)
class Result:
    """The compressed graph, what each step did, and the recipe that made it."""

    graph: Graph
    records: tuple[Record, ...]
    recipe: Recipe


def methods() -> dict[str, type[Step]]:
    """Every step, by its name in recipes."""
    found: dict[str, type[Step]] = {}
    for family in FAMILIES:
        module = importlib.import_module(f"{__package__}.{family}")
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, Step):
                found[value.name()] = value
    return found


def compress(
    task: Task,
    step: Step | Recipe | Sequence[Step],
    *,
    student: nn.Module | None = None,
    workdir: Path | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> Result:
    """Applies a step or a recipe to a copy of the task's model, or of a `student` that takes its place, exactly as told.

    Before any work it checks that the task has what the steps need and that the order makes sense. With a `workdir`,
    finished steps are kept there and a second call resumes. Raises StepError when a step would change nothing.
    """
    recipe = step if isinstance(step, Recipe) else Recipe([step] if isinstance(step, Step) else step)
    steps = list(recipe.flat())
    check(task, steps)
    begin = student if isinstance(student, Graph) else task.original if student is None else capture(student, task.example)
    graph, records = begin.copy().eval().requires_grad_(True), list[Record]()
    state = hashlib.sha256(graph.fingerprint().encode())
    for index, current in enumerate(steps):
        state.update(f"{current.name()} {sorted(_plain(current.options()).items())} {task.seed}".encode())
        folder = workdir / f"{index}-{state.hexdigest()[:12]}" if workdir else None
        if folder and (kept := _resume(folder)):
            graph, record = kept
            tell(f"{current}: resumed from {folder}")
        else:
            tell(str(current))
            record = _apply(graph, current, task, folder)
            if folder:
                _keep(folder, graph, record)
        records.append(record)
    return Result(graph.eval(), tuple(records), recipe)


def dry_run(task: Task, step: Step | Recipe) -> Iterator[tuple[Step, Plan]]:
    """The plan of every step, made on a graph on which the steps before were carried out, all but training."""
    steps = [step] if isinstance(step, Step) else list(step.flat())
    check(task, steps)
    graph = task.original.copy().requires_grad_(True)
    for current in steps:
        plan = current.plan(graph, task)
        yield current, plan
        if current.stage is not None and plan.changes:
            current.apply(graph, plan, task, None)


def check(task: Task, steps: Sequence[Step]) -> None:
    """Raises StepError, or TaskError, when the steps cannot run on this task in this order."""
    if not steps:
        raise StepError("The recipe is empty.", "at least one step")
    last: Step | None = None
    for step in steps:
        for need in step.requires():
            if not task.has(need):
                raise StepError(f"{step.name()} needs `{need}`, which the task {task.name!r} does not have.", f"Task(..., {need}=...)")
        if step.stage is None:
            continue
        if last is not None and last.stage is not None and step.stage < last.stage:
            told = f"{step.name()} ({step.stage.name.lower()}) comes after {last.name()} ({last.stage.name.lower()})."
            raise StepError(told, "shapes before weights before number formats", f"move {step.name()} before {last.name()}")
        last = step


def _apply(graph: Graph, step: Step, task: Task, folder: Path | None) -> Record:
    start, before, size = time.perf_counter(), graph.fingerprint(), _parameters(graph)
    plan = step.plan(graph, task)
    if not plan.changes:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:5])
        raise StepError(f"{step} would change nothing. {reasons}".rstrip(), "a step that changes at least one layer")
    with zeros_kept(graph):
        measured = step.apply(graph, plan, task, folder) or {}
    if graph.fingerprint() == before:
        raise StepError(f"{step} changed nothing although it planned to.", "a step that changes the graph")
    seconds = time.perf_counter() - start
    return Record(step.name(), step.options(), plan.changes, plan.skipped, (size, _parameters(graph)), seconds, measured)


def _parameters(graph: Graph) -> int:
    return sum(parameter.numel() for parameter in graph.tensors.parameters())


def _keep(folder: Path, graph: Graph, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dump(graph, folder / "graph.safetensors")
    partial = folder / "record.json.part"
    partial.write_text(json.dumps(record.to_data()))
    partial.replace(folder / "record.json")
    for file in folder.iterdir():  # what only served to resume the step
        if file.is_dir():
            shutil.rmtree(file)
        elif file.name not in ("graph.safetensors", "record.json"):
            file.unlink()


def _resume(folder: Path) -> tuple[Graph, Record] | None:
    if not (folder / "record.json").is_file():
        return None
    record = json.loads((folder / "record.json").read_text())
    record["parameters"] = tuple(record["parameters"])
    return restore(folder / "graph.safetensors"), Record(**record)


def _step(row: Any) -> Step:
    name, options = (
        (row, {}) if isinstance(row, str) else next(iter(row.items())) if isinstance(row, Mapping) and len(row) == 1 else (None, None)
    )
    known = methods()
    if not isinstance(name, str) or not isinstance(options, Mapping | None):
        raise StepError(f"{row!r} is not a step of a recipe.", "a name, or one name with its options: prune.Channels: {ratio: 0.5}")
    if name not in known:
        raise StepError(f"There is no step {name!r}.", f"one of the steps, such as {near(name, known)}", "list them with: multum steps")
    return make(known[name], options or {})


def make(kind: type[Step], options: Mapping[str, Any]) -> Step:
    """A step from options as a file or a command line gives them. Raises StepError for unknown keys and wrong types."""
    known = {f.name: f for f in fields(kind)}
    for key, value in options.items():
        if key not in known:
            raise StepError(f"{kind.name()} has no option {key!r}.", f"one of its options, such as {near(key, known)}")
        kinds = re.sub(r"\[.*?\]", "", str(known[key].type)).split(" | ")  # the annotation, as written: "str | tuple", "float | None"
        given = {"list": "tuple", "NoneType": "None"}.get(type(value).__name__, type(value).__name__)
        if given not in kinds and not (given == "int" and "float" in kinds):
            raise StepError(f"{kind.name()}: {key} is {value!r}.", f"{' or '.join(kinds)}, such as {known[key].default!r}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})


def _plain(value: Any) -> Any:
    """The same value out of JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value
