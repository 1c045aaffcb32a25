"""What the commands show in a terminal: tables and a summary, as rich renderables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .words import amount, duration, size, spread, statistics, tiles

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_LAYERS = 12  # layers that a plan names before it counts the rest
_MEMBERS = 8  # the same for the tensors of a group of channels


def summary(result: Mapping[str, Any], folder: Path, page: Path) -> RenderableType:
    """The three numbers, what they mean, and where the files are."""
    from rich.console import Group
    from rich.text import Text

    table = _table("", "", "", "")
    for tile in tiles(result):
        mark = Text("") if tile["met"] is None else Text("met", "green") if tile["met"] else Text("missed", "bold red")
        table.add_row(Text(tile["value"], "bold"), tile["title"], tile["change"], Text(f"{tile['asked'] or ''} ") + mark)
    lines = [statistics(result), result["verdict"], f"{folder / result['files']['model']}  {page}"]
    if not result["met"]:
        lines.insert(0, f"The target is not met: {result['binding']}. This is the nearest that was found.")
    return Group(table, *(Text(line) for line in lines))


def analysis(found: Mapping[str, Any]) -> RenderableType:
    """Where parameters, MACs, bytes and time are."""
    from rich.console import Group
    from rich.text import Text

    table = _table("layer", "kind", ">parameters", ">MACs", ">bytes", ">activations", ">time")
    for row in found["layers"]:
        table.add_row(row["name"], row["kind"], *_measures(row))
    table.add_section()
    table.add_row(Text("total", "bold"), "", *_measures(found["total"]))
    notes = [Text(f"not counted: {name}: {reason}", "dim") for name, reason in found["uncounted"].items()]
    return Group(table, *notes)


def limits(found: Mapping[str, Any]) -> RenderableType:
    """What each tensor of a file takes, beside its entropy and the bound."""
    from rich.console import Group
    from rich.text import Text

    table = _table("tensor", "stored as", ">bytes", ">bits each", ">entropy", ">Gaussian", ">bound", ">distortion")
    small = [row for row in found["tensors"] if row["entropy"] is None and row["bound"] is None]
    for row in found["tensors"]:
        if row in small:
            continue
        shape = "x".join(map(str, row["shape"]))
        bits = [_bits(row[key], row["shape"]) for key in ("bytes", "entropy", "gaussian", "bound")]
        error = "" if row["distortion"] is None else f"{row['distortion']:.4f}"
        table.add_row(row["name"], f"{row['dtype']} {shape}", f"{row['bytes']:,}", *bits, error)
    table.add_section()
    total, known = found["total"], found["total"]["numbers"]
    if known:
        cells = [_bits(total[key], [known]) for key in ("bytes", "entropy", "gaussian", "bound")]
        table.add_row(Text("those with a bound", "bold"), "", f"{total['bytes']:,}", *cells, "")
    table.add_row("other tensors", "", f"{found['rest']:,}")
    table.add_row("graph, names, records", "", f"{found['header']:,}")
    table.add_row(Text("file", "bold"), "", f"{found['bytes']:,}")
    note = f"{len(small)} tensors in floating point are not listed. " if small else ""
    note += "Bits each: for each number. The bound holds for independent numbers at this distortion (mean squared error over variance)."
    return Group(table, Text(note if known else f"{note} It needs the original: give the TASK too.", "dim"))


def _bits(count: float | None, shape: Sequence[int]) -> str:
    return "" if count is None else f"{8 * count / max(1, math.prod(shape)):.3f}"


def groups(found: Mapping[str, Any]) -> RenderableType:
    """Channels that are cut together, with the dimensions in which they lie; then those that cannot be cut."""
    from rich.console import Group
    from rich.text import Text

    free = [row for row in found["groups"] if row["reason"] is None]
    whole = [row for row in found["groups"] if row["reason"] is not None]
    table = _table("group", "kind", ">channels", ">parameters each", "tensor", "dim", "layout")
    for row in free:
        first: list[str | Text] = [row["name"], row["kind"], str(row["size"]), amount(row["parameters"])]
        for member in row["members"][:_MEMBERS]:
            table.add_row(*first, member["tensor"], str(member["dim"]), Text(member["layout"]))
            first = [""] * 4
        if len(row["members"]) > _MEMBERS:
            table.add_row(*first, Text(f"… {len(row['members']) - _MEMBERS} more; all of them with --json", "dim"))
    stays = _table("cannot be cut", "kind", ">channels", "because")
    for row in whole:
        stays.add_row(row["name"], row["kind"], str(row["size"]), row["reason"])
    kinds = [Text.assemble((kind, "bold"), (f": {text}", "dim")) for kind, text in found["kinds"].items()]
    parts: list[RenderableType] = [table] if free else []
    return Group(*parts, *([stays] if whole else []), Text(f"{len(free)} groups can be cut, {len(whole)} cannot."), *kinds)


def students(found: Mapping[str, Any]) -> RenderableType:
    """Candidates for a student, the original first."""
    from rich.console import Group
    from rich.text import Text

    table = _table("student", ">parameters", ">file", ">time", ">faster", ">score")
    for row in found["rows"]:
        faster = f"{found['rows'][0]['ms'] / row['ms']:.2f}x"
        table.add_row(row["name"], amount(row["parameters"]), size(row["bytes"]), duration(row["ms"]), faster, f"{row['score']:.3f}")
    notes = [Text(f"left out: {name}: {reason}", "dim") for name, reason in found["skipped"].items()]
    return Group(table, *notes)


def times(rows: Iterable[Mapping[str, Any]], verdict: str) -> RenderableType:
    """Original and compressed model in turns, for each batch size and number of threads."""
    from rich.console import Group
    from rich.text import Text

    table = _table(">batch", ">threads", ">original", "engine", ">compressed", "engine", ">faster", ">95 % bounds")
    for row in rows:
        before, after = duration(row["original"]), duration(row["compressed"])
        ratio, bounds = f"{row['ratio']:.2f}x", spread(row)
        table.add_row(str(row["batch"]), str(row["threads"]), before, row["baseline"], after, row["engine"], ratio, bounds)
    return Group(table, Text(verdict))


def plans(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What each step of a recipe would do, and what it would leave alone."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for row in rows:
        options = ", ".join(f"{key}={value!r}" for key, value in row["options"].items())
        parts.append(Text(f"{row['step']}({options}): {len(row['changes'])} changed, {len(row['skipped'])} left alone", "bold"))
        table = _table("layer", "what")
        for name, change in list(row["changes"].items())[:_LAYERS]:
            table.add_row(name, _shortly(change))
        if len(row["changes"]) > _LAYERS:
            table.add_row("…", f"{len(row['changes']) - _LAYERS} more; all of them with --json")
        for name, reason in row["skipped"].items():
            table.add_row(Text(name, "dim"), Text(f"left alone: {reason}", "dim"))
        parts.append(table)
    return Group(*parts)


def steps(rows: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The steps with their options."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for row in rows:
        needs = f", needs {', '.join(row['needs'])}" if row["needs"] else ""
        parts += [Text.assemble((row["name"], "bold"), (f"  {row['stage']}{needs}", "dim")), Text(f"  {row['source']}")]
        table = _table("  option", "default", "")
        for option in row["options"]:
            table.add_row(f"  {option['name']}", repr(option["default"]), option["help"])
        parts += [table, Text("")]
    return Group(*parts)


def _table(*columns: str) -> Table:
    """A plain table; a column whose name begins with `>` is aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_header=any(columns), pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table


def _measures(row: Mapping[str, Any]) -> list[str]:
    cells = ((amount, "parameters"), (amount, "macs"), (size, "bytes"), (size, "activations"), (duration, "ms"))
    return ["" if row.get(key) is None else text(row[key]) for text, key in cells]


def _shortly(change: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in change.items())
    return text if len(text) <= 100 else f"{text[:97]}..."
