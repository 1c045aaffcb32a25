"""The one training loop: recovery, distillation and quantization-aware training differ only in the loss they give it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TrainError
from ..graph import Graph
from ..graph.sparse import zeros_frozen
from ..task import Task, call
from . import checkpoint
from .board import Board
from .companion import Companion
from .layout import arrange, convert, lay_out
from .optimizer import Training, optimizer, scales

Loss = Callable[[Any, Any, Any], Tensor]  # (inputs, outputs, targets) -> scalar

CHECKPOINT_SECONDS = 30.0
_STEPS_BETWEEN_LOOKS = 16  # losses are read from the device, and checked, this many at a time
_SMALLEST_SCALE = 1e-8


def fit(
    graph: Graph, task: Task, loss: Loss, how: Training | None = None, workdir: Path | None = None, companions: Sequence[Companion] = ()
) -> dict[str, Any]:
    """Trains `graph` in place on the task's train data and leaves it in eval mode.

    The `companions` have a say at every step: they add to the loss, change the weights, and measure.

    Returns `steps`, `seconds`, `loss_first` and `loss_last` (means over the first and last tenth of the steps), and with
    validation data `validation`, pairs of step and score, from before the first step on, and `kept`, the step whose state
    the graph has at the end: the best after a whole pass. With a `workdir` the state is kept there, and a second call goes
    on from it; data that shuffle by torch's global random state then come in the same order. The task's own `fit` is used
    when it has one. The zeros of sparse weights stay. Raises TrainError when the loss stops being finite; the graph then has
    its last good state.
    """
    how = how or Training()
    if not any(parameter.requires_grad for parameter in graph.parameters()):
        raise TrainError("The graph has no parameter that can be trained.", "at least one with requires_grad", "graph.requires_grad_(True)")
    if task.fit is not None:
        with zeros_frozen(graph):
            return _fit_by_task(graph, task, loss, companions)
    run = _Run(graph, task, loss, how, workdir, companions)
    device = run.accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), zeros_frozen(graph):
        torch.manual_seed(task.seed)
        try:
            return run.train()
        finally:
            run.close()


class _Run:
    """One training: what it works on, where it stands, and its checkpoint."""

    def __init__(self, graph: Graph, task: Task, loss: Loss, how: Training, workdir: Path | None, companions: Sequence[Companion]):
        from accelerate import Accelerator

        self.companions, self.board = companions, Board()
        self.graph, self.task, self.loss, self.how = graph, task, loss, how
        self.home = next(graph.parameters()).device
        key = [checkpoint.FORMAT, graph.fingerprint(), asdict(how), task.seed, [companion.key for companion in companions]]
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.file = workdir / "training.safetensors" if workdir else None
        self.accelerator = Accelerator()
        self.data = task.data("train")
        self.per_pass = _length(self.data) // self.accelerator.num_processes
        if not self.per_pass:
            raise TrainError(f"The train data have fewer batches than there are processes ({self.accelerator.num_processes}).")
        self.steps = max(1, round(how.epochs * self.per_pass))
        graph.to(self.accelerator.device)
        self.format = lay_out(graph)
        self.model = self.accelerator.prepare_model(graph)
        self.parameters = [parameter for _, parameter in sorted(graph.named_parameters()) if parameter.requires_grad]
        self.scales = scales(graph)
        for companion in companions:
            companion.join(graph)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer(graph, how, self.accelerator.device))
        self.step = self.seen = 0  # steps done in all, and batches seen in this pass
        self.order: dict[str, Tensor] = {}  # the random state in which this pass began
        self.now: dict[str, Tensor] = {}  # and that of the checkpoint from which training goes on
        self.pending: list[Tensor] = []  # losses not yet looked at
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.kept, self.state = 0, _state(graph)
        self.best: float | None = None  # the score of what is kept, once the companions are content and it is judged by it
        self.seconds, self.began, self.saved = 0.0, time.perf_counter(), time.perf_counter()

    def train(self) -> dict[str, Any]:
        self._resume()
        self.graph.train()
        if not self.step:
            self._score()
        with _progress(self.steps, self.step) as tell:
            while self.step < self.steps and not self._patience_is_over():
                self._one_pass(tell)
                self._look()
                self._keep()
                self._save()
        _restore(self.graph, self.state)
        _check_finite(self.graph)
        return self._history()

    def close(self) -> None:
        """Gives the graph back as it came: on its device, without wrappers, in eval mode."""
        self.board.close()
        for name in ("forward", "_original_forward"):  # put there by Accelerate for mixed precision
            self.graph.__dict__.pop(name, None)
        if self.format is torch.channels_last:
            convert(self.graph, torch.contiguous_format)
        self.graph.to(self.home)
        self.graph.zero_grad()
        self.graph.eval()

    def _one_pass(self, tell: Callable[[float | None], None]) -> None:
        batches = _share(self.data, self.accelerator.process_index, self.accelerator.num_processes)
        if self.seen:  # resumed: what was seen is gone through again, for the order of the rest
            for _ in range(self.seen):
                next(batches)
            checkpoint.set_random_state(self.now, self.accelerator.device)
        else:
            self.order = checkpoint.random_state(self.accelerator.device)
        for inputs, targets in batches:
            self._update(inputs, targets)
            if len(self.pending) >= _STEPS_BETWEEN_LOOKS:
                self._look()
            tell(self.losses[-1] if self.losses else None)
            if self.step == self.steps:
                return
            if self.file and time.perf_counter() - self.saved > CHECKPOINT_SECONDS:
                self._look()
                self._save()
        self.seen = 0

    def _update(self, inputs: Any, targets: Any) -> None:
        device = self.accelerator.device
        inputs, targets = arrange(inputs, device, self.format), arrange(targets, device)
        seen = inputs
        for companion in self.companions:
            seen = companion.view(seen)
        with self.accelerator.autocast():
            value = self.loss(inputs, call(self.model, arrange(seen, format=self.format)), targets)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            form = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TrainError(f"The loss gave {form}.", "one number that depends on the outputs")
        for companion in self.companions:
            companion.before(self.step, self.steps)
            value = value + companion.term()
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.rate(self.step, self.steps) * group.get("factor", 1.0)
        self.accelerator.backward(value)
        if self.how.clip:
            self.accelerator.clip_grad_norm_(self.parameters, self.how.clip)
        self.optimizer.step()
        self._constrain()
        self.optimizer.zero_grad()
        self.pending.append(value.detach().float().reshape(()))
        self.step += 1
        self.seen += 1

    @torch.no_grad()
    def _constrain(self) -> None:
        """What must hold for the parameters after every step."""
        for scale in self.scales:
            scale.clamp_(min=_SMALLEST_SCALE)
        for companion in self.companions:
            companion.after(self.step, self.steps)

    def _look(self) -> None:
        """Reads the losses since the last look. Raises TrainError, with the last good state restored, when one is not finite."""
        values = torch.stack(self.pending).tolist() if self.pending else []
        self.pending.clear()
        for position, value in enumerate(values):
            if not math.isfinite(value):
                _restore(self.graph, self.state)
                raise TrainError(
                    f"The loss is {value} at step {self.step - len(values) + position + 1} of {self.steps}.",
                    "a finite number",
                    f"lower the learning rate ({self.how.learning_rate:g}); the state of step {self.kept} is restored",
                )
        self.losses += values
        if values:
            self.board.scalars(self.step, loss=float(np.mean(values)), rate=self.how.rate(self.step - 1, self.steps))

    def _score(self) -> float | None:
        if self.task.validation is None:
            return None
        from accelerate.utils import broadcast

        self.graph.eval()
        device = self.accelerator.device
        score = np.mean(self.task.score(lambda inputs: call(self.graph, arrange(inputs, device, self.format))))
        self.graph.train()
        # the statistics of batch normalization differ between processes: the first one decides for all
        value = float(broadcast(torch.tensor(float(score), dtype=torch.float64, device=device)))
        self.validation.append((self.step, value))
        self.board.scalars(self.step, score=value)
        return value

    def _keep(self) -> None:
        """Takes the present state for the result, if it is the best so far or there is nothing to judge it by.

        Until the companions are content, the last state is the best.
        """
        self.board.histograms(self.step, self.graph)
        with ExitStack() as judged:
            for companion in self.companions:
                judged.enter_context(companion.judged())
            score, content = self._score(), all(companion.met() for companion in self.companions)
            better = score is None or self.best is None or (score > self.best if self.task.higher_is_better else score < self.best)
            if self.best is None or (content and better):
                self.kept, self.state = self.step, _state(self.graph)
                self.best = score if content else None

    def _patience_is_over(self) -> bool:
        return bool(self.how.patience and self.kept) and sum(step > self.kept for step, _ in self.validation) >= self.how.patience

    def _history(self) -> dict[str, Any]:
        tenth = max(1, len(self.losses) // 10)
        history: dict[str, Any] = {
            "steps": self.step,
            "seconds": self.seconds + time.perf_counter() - self.began,
            "loss_first": float(np.mean(self.losses[:tenth])),
            "loss_last": float(np.mean(self.losses[-tenth:])),
        }
        for companion in self.companions:
            history |= companion.measured()
        return history | ({"validation": self.validation, "kept": self.kept} if self.validation else {})

    def _save(self) -> None:
        """Writes all that a later call needs to go on from here, in one file."""
        self.saved = time.perf_counter()
        if self.file is None or not self.accelerator.is_main_process:
            return
        position = {"step": self.step, "seen": self.seen, "kept": self.kept, "losses": self.losses, "validation": self.validation}
        position["best"] = self.best
        position["seconds"] = self.seconds + time.perf_counter() - self.began
        parts = {"graph": dict(self.graph.named_tensors()), "kept": self.state, "optimizer": checkpoint.moments(self.optimizer, self.graph)}
        parts |= {"order": self.order, "now": checkpoint.random_state(self.accelerator.device)}
        parts |= {f"companion{index}": companion.state() for index, companion in enumerate(self.companions)}
        checkpoint.save(self.file, self.key, position, parts)

    def _resume(self) -> None:
        if self.file is None or not self.file.is_file():
            return
        position, parts = checkpoint.load(self.file, self.key)
        _restore(self.graph, parts["graph"])
        self.state = {name: tensor.to(self.accelerator.device) for name, tensor in parts["kept"].items()}
        checkpoint.restore_moments(self.optimizer, self.graph, parts.get("optimizer", {}))
        self.order, self.now = parts["order"], parts["now"]
        self.step, self.seen, self.kept = position["step"], position["seen"], position["kept"]
        self.losses, self.seconds, self.best = position["losses"], position["seconds"], position["best"]
        for index, companion in enumerate(self.companions):
            companion.restore(parts.get(f"companion{index}", {}))
        self.validation = [(step, score) for step, score in position["validation"]]
        checkpoint.set_random_state(self.order if self.seen else self.now, self.accelerator.device)


def _fit_by_task(graph: Graph, task: Task, loss: Loss, companions: Sequence[Companion]) -> dict[str, Any]:
    """The same by the user's own loop; a step is a call of the loss."""
    assert task.fit is not None
    steps = _length(task.data("train")) if companions else 0  # how long it will go on nobody says: a pass is assumed
    for companion in companions:
        companion.join(graph)
    begin, losses = time.perf_counter(), list[Tensor]()

    def noted(inputs: Any, outputs: Any, targets: Any) -> Tensor:
        value = loss(inputs, outputs, targets)
        for companion in companions:
            companion.before(len(losses), steps)
            value = value + companion.term()
            with torch.no_grad():
                companion.after(len(losses), steps)
        losses.append(value.detach())
        return value

    if changed := [companion for companion in companions if {"view", "judged"} & type(companion).__dict__.keys()]:
        named = type(changed[0]).__name__
        raise TrainError(f"The task's own fit knows nothing of {named!r}.", "a training by the one loop", "a task without fit")
    state = _state(graph)
    graph.train()
    task.fit(graph, noted)
    graph.eval()
    values = [float(value) for value in losses]
    if not values or not all(math.isfinite(value) for value in values):
        _restore(graph, state)
        raise TrainError(f"The task's fit called the loss {len(values)} times and not every value is finite.", "finite losses")
    _check_finite(graph)
    tenth = max(1, len(values) // 10)
    history: dict[str, Any] = {"loss_first": float(np.mean(values[:tenth])), "loss_last": float(np.mean(values[-tenth:]))}
    for companion in companions:
        history |= companion.measured()
    return {"steps": len(values), "seconds": time.perf_counter() - begin, **history}


def _length(data: Iterable[Any]) -> int:
    """The number of batches in a pass; counted when the data do not say."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in data)


def _share(data: Iterable[Any], rank: int, processes: int) -> Iterator[Any]:
    """Every process sees other batches, and as many as every other; a last incomplete round is left out."""
    mine = None
    for index, batch in enumerate(data):
        if index % processes == rank:
            mine = batch
        if index % processes == processes - 1:
            yield mine


def _state(graph: Graph) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in graph.named_tensors()}


@torch.no_grad()
def _restore(graph: Graph, state: Mapping[str, Tensor]) -> None:
    for name, tensor in graph.named_tensors():
        tensor.copy_(state[name])


def _check_finite(graph: Graph) -> None:
    for name, tensor in graph.named_tensors():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainError(f"The tensor {name!r} is not finite after training.", "finite weights", "lower the learning rate")


@contextmanager
def _progress(steps: int, done: int) -> Iterator[Callable[[float | None], None]]:
    """A bar on a terminal's standard error; nothing elsewhere. Gives the function that moves it on by one step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("training", total=steps, completed=done)

        def tell(loss: float | None) -> None:
            bar.update(row, advance=1, description="training" if loss is None else f"training, loss {loss:.4f}")

        yield tell
