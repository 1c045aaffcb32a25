"""`Task`: what the user brings, a trained model with its data, loss and score; and loading one from a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import MultumError, TaskError, near
from .graph import Graph, capture
from .graph.capture import arguments

Batches = Iterable[tuple[Any, Any]]
Predict = Callable[[Any], Any]
Metric = Callable[[Predict, Batches], Any]

PARTS = ("train", "calibration", "validation", "test")


@dataclass(eq=False)
class Task:
    """A trained model and what is needed to compress and judge it. Only `model` and `example` are required.

    `example` is one batch of inputs: a tensor, a tuple (passed by position) or a dict (passed by name), nested at will.
    `train`, `calibration`, `validation` and `test` are iterables of `(inputs, targets)` batches that can be run through
    again and again; validation steers the search, test is used once at the end. `loss(outputs, targets)` gives a scalar
    tensor, or one for each output, in a dict or a tuple as the outputs are; they are summed. `metric(predict, data)` gets
    any callable from inputs to outputs and gives one score for each sample [n], or one number; without it the score is the
    agreement with the original in percent. `fit(graph, loss)` replaces the training loop by the user's own: it trains
    `graph` in place with `loss(inputs, outputs, targets)`.
    """

    model: nn.Module
    example: Any
    train: Batches | None = None
    calibration: Batches | None = None
    validation: Batches | None = None
    test: Batches | None = None
    loss: Callable[[Any, Any], Any] | None = None
    metric: Metric | None = None
    fit: Callable[[Graph, Callable[[Any, Any, Any], Tensor]], None] | None = None
    higher_is_better: bool = True
    name: str = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TaskError(f"The task's model is a {type(self.model).__name__}.", "a torch.nn.Module")
        for name in ("loss", "metric", "fit"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TaskError(f"The task's {name} is a {type(getattr(self, name)).__name__}.", "a function")
        for name in PARTS:
            data = getattr(self, name)
            if isinstance(data, Iterator):
                raise TaskError(
                    f"The task's {name} data can be run through only once ({type(data).__name__}).",
                    "an iterable that starts anew each time",
                    "give a list of batches, a DataLoader, or an object with __iter__",
                )
        check_finite(self.example, "example")

    @cached_property
    def original(self) -> Graph:
        """The captured model, in eval mode: the teacher and the yardstick. Nothing may change it."""
        graph = capture(self.model, self.example)
        return graph.requires_grad_(False)

    def has(self, need: str) -> bool:
        """Whether the task has a part of the data, or a loss. Train data serve for calibration as well."""
        return getattr(self, need) is not None or (need == "calibration" and self.train is not None)

    def but(self, **parts: Any) -> Task:
        """The same task with other parts, such as `train`, and the same captured original."""
        other = replace(self, **parts)
        other.__dict__["original"] = self.original
        return other

    def data(self, part: str) -> Batches:
        """The batches of one part of the data. Raises TaskError when the task has none."""
        batches = getattr(self, part)
        if batches is None and self.has(part):
            batches = self.train
        if batches is None:
            raise TaskError(f"The task {self.name!r} has no {part} data.", f"an iterable of (inputs, targets) batches as `{part}`")
        return checked(batches, part)

    def score(self, predict: Predict, part: str = "validation") -> np.ndarray | float:
        """One score per sample [n], or one number. Raises TaskError when the metric gives something else."""
        metric = self.metric or self._agreement
        with torch.inference_mode():
            value = metric(predict, self.data(part))
        scores = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
        if scores.ndim > 1 or scores.size == 0:
            raise TaskError(f"The metric gave an array of shape {scores.shape}.", "one score per sample [n], or one number")
        if not np.isfinite(scores).all():
            raise TaskError("The metric gave NaN or an infinite score.", "finite scores", "check the metric and the outputs")
        return scores if scores.ndim else float(scores)

    def _agreement(self, predict: Predict, data: Batches) -> np.ndarray:
        rows = [100.0 * (labels(predict(x)) == labels(call(self.original, x))).double() for x, _ in data]
        return torch.cat([row.flatten() for row in rows]).numpy()


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Calls a model with one batch: a tensor alone, a tuple by position, a dict by name."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a nested value, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def total(losses: Any) -> Any:
    """A loss that is one number [], or the sum of several in a dict or a tuple."""
    return sum(tensors(losses)) if isinstance(losses, Mapping | tuple | list) else losses


def logits(outputs: Any) -> Tensor:
    """The first floating-point tensor of a model's outputs. Raises TaskError when there is none."""
    for tensor in tensors(outputs):
        if tensor.is_floating_point():
            return tensor
    raise TaskError("The model's outputs hold no floating-point tensor.", "at least one, such as logits")


def labels(outputs: Any) -> Tensor:
    """The largest of the last (for images of logits: the second) dimension of the first output, per sample."""
    value = logits(outputs)
    return value.argmax(1 if value.ndim == 4 else -1)


def check_finite(value: Any, what: str) -> None:
    """Raises TaskError when a floating-point tensor in `value` holds NaN or an infinite number."""
    for tensor in tensors(value):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TaskError(f"The {what} holds NaN or infinite values.", "finite numbers", "check how the data are loaded and normalized")


def calibration(task: Task, samples: int) -> Iterator[Any]:
    """The inputs of the first calibration batches, up to `samples` samples; a shuffling loader gives the same ones each time.

    Raises TaskError for a batch that differs from the example in more than the number of samples.
    """
    expected = _forms(task.example)
    for inputs, _ in first(task, "calibration", samples):
        if (found := _forms(inputs)) != expected:
            raise TaskError(f"A sample of the calibration data has the shape {found}.", f"that of the example, {expected}")
        yield inputs


def _forms(inputs: Any) -> str:
    """The shapes of one sample, and whether they hold numbers or indices, in an order that does not depend on names."""
    forms = [f"{list(leaf.shape[1:])}{'' if leaf.is_floating_point() else ' of integers'}" for leaf in tensors(inputs)]
    return ", ".join(sorted(forms))


def first(task: Task, part: str, samples: int) -> Iterator[tuple[Any, Any]]:
    """The first batches of one part of the data, up to `samples` samples; a shuffling loader gives the same ones each time."""
    seen = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        for inputs, targets in task.data(part):
            yield inputs, targets
            seen += batch_size(inputs)
            if seen >= samples:
                return


def batch_size(inputs: Any) -> int:
    """The number of samples in a batch: the first dimension of its first tensor that has one."""
    return next((len(leaf) for leaf in tensors(inputs) if leaf.ndim), 1)


def rows(value: Any, size: int, begin: int, end: int) -> Any:
    """Samples `begin` to `end` of a nested value with `size` samples; what has no such first dimension stays whole."""
    if isinstance(value, Tensor):
        return value[begin:end] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        return {key: rows(part, size, begin, end) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(rows(part, size, begin, end) for part in value)
    return value


def checked(batches: Batches, part: str) -> Batches:
    """The same batches; each is checked to be a pair of finite inputs and targets as it comes by."""
    return _Checked(batches, part)


class _Checked:
    def __init__(self, batches: Batches, part: str):
        self.batches, self.part = batches, part

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        count = 0
        for count, batch in enumerate(self.batches, 1):  # noqa: B007
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TaskError(f"A batch of the {self.part} data is a {type(batch).__name__}.", "a pair (inputs, targets)")
            check_finite(batch, f"{self.part} data")
            yield batch[0], batch[1]
        if not count:
            raise TaskError(f"The {self.part} data are empty.", "at least one batch")


def load_task(reference: str | Path) -> Task:
    """The task that `path.py`, `path.py:function` or `package.module:function` gives (the function is `task` if not named)."""
    place, _, function = str(reference).partition(":") if not Path(reference).is_file() else (str(reference), "", "")
    function = function or "task"
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    make = getattr(module, function, None)
    if not callable(make):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise TaskError(f"{place} has no function {function!r}.", f"a function that returns a Task; near: {near(function, names)}")
    with _importing_from(Path(place).parent if place.endswith(".py") else None):
        try:
            made = make()
        except MultumError:
            raise
        except Exception as error:
            raise TaskError(f"{function}() of {place} fails: {type(error).__name__}: {error}", "a function that returns a Task") from error
    if not isinstance(made, Task):
        raise TaskError(f"{function}() of {place} returned a {type(made).__name__}.", "a multum.Task")
    return made


def _load_file(path: Path) -> Any:
    if not path.is_file():
        candidates = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise TaskError(
            f"There is no task file {str(path)!r}.", f"a Python file with a function task(); near: {near(str(path), candidates)}"
        )
    description = importlib.util.spec_from_file_location(f"multum_task_{abs(hash(path.resolve()))}", path)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules[description.name] = module  # dataclasses and worker processes look the module up
    with _importing_from(path.parent):
        try:
            description.loader.exec_module(module)
        except Exception as error:
            del sys.modules[description.name]
            raise TaskError(f"The task file {str(path)!r} fails: {type(error).__name__}: {error}", "a file that can be imported") from error
    return module


def _load_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"The task {name!r} cannot be imported: {error}", "path.py, path.py:function or package.module:function") from error


@contextmanager
def _importing_from(folder: Path | None) -> Iterator[None]:
    """Lets a task file import its neighbours, whose names are often common, without mixing them up with those of another task."""
    if folder is None:
        yield
        return
    place = str(folder.resolve())
    neighbours = [path.stem for path in folder.glob("*.py")] + [path.parent.name for path in folder.glob("*/__init__.py")]
    hidden = {name: sys.modules.pop(name) for name in neighbours if name in sys.modules}
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        for name in neighbours:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
