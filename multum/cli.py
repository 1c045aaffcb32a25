"""The command line: each command is a few lines over a public function.

What a command finds goes to stdout, with `--json` as JSON and nothing else; progress and errors go to stderr. Exit codes:
0 done, 1 done but the target is not met, 2 the input or the command cannot be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import ExportError, FileError, MultumError, StepError, TaskError, near

if TYPE_CHECKING:
    from .search import Outcome


class _Commands(TyperGroup):
    """Prints errors of the package as what they say, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MultumError as error:
            _print_error(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("Stopped. What was finished is kept: the same command goes on from there.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="A trained neural network goes in; the smallest and fastest one that keeps its accuracy comes out, with the evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="a folder that compress or run has written")]
TaskRef = Annotated[str, typer.Argument(metavar="TASK", help="path.py, path.py:function or package.module:function")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="a .mip file")]
Out = Annotated[Path, typer.Option("--out", help="the folder for the result")]
Tensorboard = Annotated[Path | None, typer.Option(metavar="DIR", help="write the curves of every training there, for TensorBoard")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout and nothing else there")]


@app.command(epilog="Examples: `multum analyze task.py`, `multum analyze --size out/model.mip task.py`")
def analyze(
    task: Annotated[str | None, typer.Argument(metavar="TASK", help="path.py, path.py:function or package.module:function")] = None,
    groups: Annotated[bool, typer.Option("--groups", help="instead: which channels are cut together, and why some cannot be cut")] = False,
    students: Annotated[bool, typer.Option("--students", help="instead: networks that could be trained in its place")] = False,
    size: Annotated[Path | None, typer.Option("--size", metavar="FILE", help="a .mip file: its bytes instead, beside their bounds")] = None,
    as_json: AsJson = False,
) -> None:
    """Where a model's parameters, MACs, bytes and milliseconds are, layer by layer.

    With `--size`: what each tensor of a file takes, its entropy, and, next to the original in TASK, the least that it could take.

    With --groups: its groups of channels. Each line is a dimension of a tensor in which the group lies; in `3 x [12] x 64` the
    brackets are the group's own 12 channels, each with 64 numbers in three places.

    With --students: the model cut to some widths and depths, and light networks that fit its inputs, each with the size of its file, its
    measured time and a score from 0 to 1 that needs no training: how alike samples relate in it and in the model.
    """
    from .analyze import analyze as analyze_task
    from .analyze import groups as groups_of
    from .report import terminal
    from .search import students as students_of
    from .task import load_task

    if task is None and size is None:
        raise TaskError("There is nothing to analyze.", "a TASK, or --size FILE", "multum analyze --help")
    with _working():
        loaded = None if task is None else load_task(task)
        if size is not None:
            from .pack import limits

            found = limits(size, loaded.original if loaded else None).to_data()
        elif loaded is not None:
            found = students_of(loaded).to_data() if students else groups_of(loaded) if groups else analyze_task(loaded).to_data()
    chosen = {terminal.limits: size is not None, terminal.students: students, terminal.groups: groups, terminal.analysis: True}
    show = next(table for table, asked in chosen.items() if asked)
    _show(found, as_json, lambda: show(found))


@app.command(epilog="Example: `multum compress examples/fashion_mnist/task.py --size 1/10 --max-drop 0.5 --out out/`")
def compress(
    task: TaskRef,
    size: Annotated[str | None, typer.Option(help="1/10 or 10x smaller than the fp32 file, or 200KB, 2MB")] = None,
    speed: Annotated[str | None, typer.Option(help="times faster than the best fp32 engine: 2 or 2x")] = None,
    max_drop: Annotated[float | None, typer.Option(help="largest loss, in the unit of the task's score")] = None,
    minutes: Annotated[float | None, typer.Option(help="end the search after this time; the last measurement comes on top")] = None,
    out: Out = Path("out"),
    tensorboard: Tensorboard = None,
    as_json: AsJson = False,
) -> None:
    """Find the recipe that meets a target; write the model and the evidence.

    Exit code 1: the nearest that was found is written, but it misses the target.
    """
    from .search import Target, search
    from .task import load_task
    from .train import shown

    target = Target(size, speed, max_drop, minutes)
    with _working(), shown(tensorboard):
        outcome = search(load_task(task), target, out, tell=_tell)
    _finish(outcome, as_json)


@app.command(epilog="Example: `multum run recipe.yaml examples/fashion_mnist/task.py --out out/`")
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML list of steps; `multum steps` lists them")],
    task: TaskRef,
    out: Out = Path("out"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what each step would do, and stop")] = False,
    tensorboard: Tensorboard = None,
    as_json: AsJson = False,
) -> None:
    """Carry out a recipe; write the model and the evidence."""
    from . import step
    from .report import terminal
    from .search import run as run_recipe
    from .task import load_task
    from .train import shown

    steps = step.Recipe.load(recipe)
    if not dry_run:
        with _working(), shown(tensorboard):
            outcome = run_recipe(load_task(task), steps, out, tell=_tell)
        _finish(outcome, as_json)
        return
    with _working():
        plans = list(step.dry_run(load_task(task), steps))
    data = [{"step": one.name(), "options": one.options(), "changes": plan.changes, "skipped": plan.skipped} for one, plan in plans]
    _show(data, as_json, lambda: terminal.plans(data))


@app.command(epilog="Example: `multum bench out/model.mip`")
def bench(
    model: Model,
    original: Annotated[Path | None, typer.Option(help="what to compare with; else the original.onnx beside MODEL")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a model against the original, in turns on the same threads."""
    from .pack import load
    from .report import terminal
    from .search.times import full, inputs_of

    yardstick = original or model.with_name("original.onnx")
    if not yardstick.is_file():
        raise FileError(f"There is no {yardstick} to compare with.", "the original beside the model", "name it: --original original.onnx")
    with _working():
        times = full(yardstick, model, inputs_of(load(model)))
    data = times.to_data()
    _show(data, as_json, lambda: terminal.times(data["rows"], data["verdict"]))


@app.command(epilog="Example: `multum export out/model.mip --to onnx`")
def export(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="the format: onnx")] = "onnx",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the file; else MODEL with the format's ending")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for another runtime; the file is run and compared before it counts."""
    from .export import FORMATS
    from .export import export as export_graph
    from .pack import load

    if to not in FORMATS:
        raise ExportError(f"There is no export to {to!r}.", f"one of {', '.join(FORMATS)}")
    path = output or model.with_suffix(f".{to}")
    with _working():
        export_graph(load(model), path, to)
    data = {"path": str(path), "bytes": path.stat().st_size}
    _show(data, as_json, lambda: f"{path} ({data['bytes']:,} bytes), run and compared")


@app.command(epilog="Examples: `multum pack model.onnx`, `multum pack model.onnx small.mip --json`")
def pack(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="an ONNX file, of any origin")],
    path: Annotated[Path | None, typer.Argument(metavar="FILE", help="the .mip file to write; else SOURCE with that ending")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an ONNX file smaller without changing a bit: the same operators, the same numbers."""
    from .pack import pack as pack_onnx

    path = path or source.with_suffix(".mip")
    with _working():
        size = pack_onnx(source, path, tell=_tell)
    before = source.stat().st_size
    data = {"path": str(path), "bytes": size, "original": before, "ratio": before / size}
    _show(data, as_json, lambda: f"{path} ({size:,} of {before:,} bytes, {1 - size / before:.0%} smaller), every tensor read back")


@app.command(epilog="Example: `multum unpack small.mip model.onnx`")
def unpack(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="a .mip file that `multum pack` wrote")],
    target: Annotated[Path | None, typer.Argument(metavar="TARGET", help="the ONNX file to write; else FILE with that ending")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the ONNX file that was packed."""
    from .pack import unpack as unpack_onnx

    target = target or path.with_suffix(".onnx")
    with _working():
        size = unpack_onnx(path, target, tell=_tell)
    _show({"path": str(target), "bytes": size}, as_json, lambda: f"{target} ({size:,} bytes)")


@app.command(epilog="Example: `multum report out/`")
def report(out: Folder, as_json: AsJson = False) -> None:
    """Write the HTML page of a result."""
    from .report import report as write_report

    path = write_report(out)
    _show({"path": str(path)}, as_json, lambda: str(path))


@app.command(epilog="Example: `multum steps prune.Channels`")
def steps(name: Annotated[str | None, typer.Argument(metavar="STEP", help="one step; else all")] = None, as_json: AsJson = False) -> None:
    """List every step with its options, their defaults, and where the method comes from."""
    from .report import catalog, terminal

    rows = catalog()
    known = [row["name"] for row in rows]
    if name is not None and name not in known:
        raise StepError(f"There is no step {name!r}.", f"one of the steps, such as {near(name, known)}", "list them with: multum steps")
    rows = [row for row in rows if name in (None, row["name"])]
    _show(rows, as_json, lambda: terminal.steps(rows))


def main() -> None:
    """The `multum` command."""
    app()


def _finish(outcome: Outcome, as_json: bool) -> None:
    """Shows how a search or a run ended, and turns it into the exit code."""
    from .report import report as write_report
    from .report import terminal

    page = write_report(outcome.folder)
    _show(outcome.data, as_json, lambda: terminal.summary(outcome.data, outcome.folder, page))
    if outcome.interrupted:
        raise typer.Exit(130)
    if not outcome.met:
        raise typer.Exit(1)


def _show(data: Any, as_json: bool, text: Any) -> None:
    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    from rich.console import Console

    Console().print(text())


def _tell(message: str) -> None:
    typer.secho(message, err=True, dim=True)


def _print_error(error: MultumError) -> None:
    typer.secho("Error: ", err=True, fg="red", nl=False)
    typer.echo(str(error), err=True)


@contextlib.contextmanager
def _working() -> Iterator[None]:
    """Sends whatever is printed meanwhile, by the user's code, libraries and child processes too, to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
