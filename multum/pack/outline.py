"""The description of a graph without what follows from the rest: what repeats in a network then repeats letter by letter.

Nodes are named by what the reader has not used yet: ``~0`` is the first such node, ``~-1`` the last one, ``~7u`` the one seven rows
back that was used before. Tensors are numbered in the order in which the graph reads them, ``aten.`` and ``.default`` go without saying,
and so does the module of an operator when it is that of its last input.

    ["get", name]                          0, or the number of a tensor that was read before, from 1
    ["call", target, args, module, kwargs] [target, *args, {"m": module, "k": kwargs}]; the last where there is something to say
    ["in", ...], ["out", values]           ["in", ...], ["out", *values]
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = list[Any]
_KINDS = ("buffers", "integers", "sparse")  # of tensors that the description names


def shrink(graph: Mapping[str, Any], halves: Iterable[str], tensors: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The description, with what it says of tensors as one digit for each, and the tensors in its order."""
    rows, names = _Rows(), list[str]()
    places: dict[str, int] = {}
    short = []
    for row in graph["nodes"]:
        if row[0] == "get" and row[1] not in places:
            places[row[1]] = len(names)
            names.append(row[1])
            short.append(rows.end(0, row[1].rpartition(".")[0]))
        elif row[0] == "get":
            short.append(rows.end(places[row[1]] + 1, row[1].rpartition(".")[0]))
        elif row[0] == "call":
            args = [rows.name(part) for part in row[2]]
            more = {"k": {key: rows.name(part) for key, part in row[4].items()}} if len(row) > 4 else {}
            told = {"m": row[3]} if row[3] != rows.module else {}
            short.append(rows.end([_short(row[1]), *args, *([told | more] if told or more else [])], row[3]))
        else:
            short.append(rows.end(list(row) if row[0] == "in" else ["out", *(rows.name(part) for part in row[1])], ""))
    names += [name for name in tensors if name not in places]
    sets = [set(graph.get(kind, ())) for kind in _KINDS] + [set(halves)]
    marks = "".join(f"{sum((name in those) << bit for bit, those in enumerate(sets)):x}" for name in names)
    return {key: graph[key] for key in ("graph", "inputs", "outputs", "pinned")} | {"nodes": short, "tensors": marks}, names


def expand(short: Mapping[str, Any], names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The inverse of ``shrink``: the description, and the tensors of 16 bits. Raises ``ValueError`` and its like for another input."""
    rows, read = _Rows(), 0
    nodes: list[Row] = []
    for row in short["nodes"]:
        if isinstance(row, int):
            read, number = (read + 1, read) if row == 0 else (read, row - 1)
            if not 0 <= number < len(names):
                raise ValueError(f"there is no tensor {number}")
            nodes.append(rows.end(["get", names[number]], names[number].rpartition(".")[0]))
        elif row[0] == "in":
            nodes.append(rows.end(list(row), ""))
        elif row[0] == "out":
            nodes.append(rows.end(["out", [rows.node(part) for part in row[1:]]], ""))
        else:
            told = row[-1] if isinstance(row[-1], dict) and row[-1].keys() <= {"m", "k"} else {}
            args = [rows.node(part) for part in row[1 : len(row) - bool(told)]]
            more = [{key: rows.node(part) for key, part in told["k"].items()}] if "k" in told else []
            module = told.get("m", rows.module)
            nodes.append(rows.end(["call", _long(row[0]), args, module, *more], module))
    if len(short["tensors"]) != len(names):
        raise ValueError(f"{len(short['tensors'])} marks for {len(names)} tensors")
    sets = [[n for n, mark in zip(names, short["tensors"], strict=True) if int(mark, 16) >> bit & 1] for bit in range(len(_KINDS) + 1)]
    graph = {key: short[key] for key in ("graph", "inputs", "outputs", "pinned")} | {"nodes": nodes}
    return graph | dict(zip(_KINDS, sets, strict=False)), sets[-1]


def _short(target: str) -> str:
    return target.removeprefix("aten.").removesuffix("default") if target.startswith("aten.") else target


def _long(target: str) -> str:
    if "." not in target:
        return target
    return f"aten.{target}default" if target.endswith(".") else f"aten.{target}"


class _Rows:
    """The rows so far: which of them nobody has used, and the module of each."""

    def __init__(self) -> None:
        self.unused = list[int]()
        self.modules = list[str]()
        self.module = ""  # of the last row that was named

    def end(self, row: Any, module: str) -> Any:
        """Counts a finished row; returns it."""
        self.unused.append(len(self.modules))
        self.modules.append(module)
        self.module = ""
        return row

    def name(self, value: Any) -> Any:
        """An argument with its nodes named."""
        if isinstance(value, str) and value.startswith("~"):
            return f"~{value}"
        if not (isinstance(value, dict) and "n" in value):
            return self._inside(value, self.name)
        node = value["n"]
        self.module = self.modules[node]
        place = bisect.bisect_left(self.unused, node)
        if place == len(self.unused) or self.unused[place] != node:
            return f"~{len(self.modules) - node}u"
        behind = place - len(self.unused)
        del self.unused[place]
        return f"~{place}" if place < -behind else f"~{behind}"

    def node(self, value: Any) -> Any:
        """An argument with its names made nodes."""
        if not isinstance(value, str) or not value.startswith("~"):
            return self._inside(value, self.node)
        if value.startswith("~~"):
            return value[1:]
        node = len(self.modules) - int(value[1:-1]) if value.endswith("u") else self.unused.pop(int(value[1:]))
        if not 0 <= node < len(self.modules):
            raise ValueError(f"{value} names no node")
        self.module = self.modules[node]
        return {"n": node}

    @staticmethod
    def _inside(value: Any, change: Callable[[Any], Any]) -> Any:
        if isinstance(value, list):
            return [change(part) for part in value]
        if isinstance(value, dict):
            return {key: change(part) for key, part in value.items()}
        return value
