"""The end of a search: the test data, once; the whole measurement; and the files, each of them whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .. import __version__
from ..analyze import Analysis, Row, analyze
from ..analyze.statistics import Drop
from ..graph import Graph
from ..pack import limits, load, sizes
from ..runtime import Session
from ..runtime.benchmark import Timing
from .evaluate import Candidate, Scores, Workshop, writing
from .judge import Judge
from .times import Pair, full

VERSION = 1  # of result.json, see docs/result.md
FILES = {
    "model": "model.mip",
    "onnx": "model.onnx",
    "original": "original.onnx",
    "recipe": "recipe.yaml",
    "candidates": "candidates.json",
    "result": "result.json",
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a search ended. `data` is what `result.json` holds; `binding` names the part of the target that was missed."""

    folder: Path
    data: dict[str, Any]

    @property
    def met(self) -> bool:
        return self.data["met"] is True

    @property
    def binding(self) -> str | None:
        value: str | None = self.data["binding"]
        return value

    @property
    def interrupted(self) -> bool:
        return bool(self.data["stopped"] == "interrupted")

    @property
    def model(self) -> Path:
        return self.folder / FILES["model"]

    @property
    def graph(self) -> Graph:
        """The compressed model, read from its file."""
        return load(self.model)

    def __str__(self) -> str:
        ratios, drop = self.data["ratios"], self.data["drop"]
        lost = f", {drop['points']:.2f} points lost" if drop else ""
        end = "" if not self.data["target"] else "; target met" if self.met else f"; target not met ({self.binding})"
        return f"{ratios['size']:.1f}x smaller, {ratios['speed']['ratio']:.2f}x the speed{lost}{end}"


def finish(
    workshop: Workshop, judge: Judge, chosen: Candidate, out: Path, *, candidates: Sequence[Mapping[str, Any]], stopped: str | None
) -> Outcome:
    """Measures the chosen candidate for good and writes everything about it to `out`, `result.json` last."""
    task, original, tell = judge.task, judge.original, workshop.tell
    tell("The last measurement: test data, times, layers.")
    part, before, after = _scored(judge, chosen)
    drop = judge.drop(before, after)
    times = full(original.onnx, chosen.onnx, task.example)
    pair = times.pairs[0]
    misses = judge.misses(chosen.bytes, pair.ratio, drop.points if drop else None)
    profiles = analyze(task), analyze(workshop.graph(chosen))
    data = {
        "result": VERSION,
        "multum": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "name": task.name,
        "met": not misses,
        "missed": misses,
        "binding": None if not misses else "minutes" if stopped == "minutes" else max(misses, key=lambda name: misses[name]),
        "stopped": stopped,
        "target": judge.target.to_data(),
        "limit": judge.target.limit(original.bytes),
        "higher_is_better": task.higher_is_better,
        "steered_by": "validation" if task.validation is not None else None,
        "original": _side(original, before, profiles[0], pair.original) | {"fingerprint": task.original.fingerprint()},
        "compressed": _side(chosen, after, profiles[1], pair.candidate),
        "ratios": {"size": original.bytes / chosen.bytes, "speed": pair.headline},
        "drop": _drop(drop, part),
        "verdict": _verdict(pair, profiles[1]),
        "bench": [row.to_data() for row in times.pairs],
        "recipe": chosen.recipe.to_data(),
        "records": chosen.records,
        "layers": _layers(profiles, sizes(chosen.model)),
        "limits": limits(chosen.model, task.original).to_data(),
        "candidates": len(candidates),
        "files": FILES | {"report": "report.html"},
        "machine": times.measured.machine,
    }
    reference = original.to_data()
    texts = {
        "recipe": yaml.safe_dump(data["recipe"], sort_keys=False),
        "candidates": json.dumps({"candidates": [reference, *candidates]}, indent=1),
        "result": json.dumps(data, indent=1),
    }
    _publish(out, {"model": chosen.model, "onnx": chosen.onnx, "original": original.onnx}, texts)
    return Outcome(out, data)


def _scored(judge: Judge, chosen: Candidate) -> tuple[str | None, Scores | None, Scores | None]:
    """Which data the final scores are of, and those of original and compressed: test data where there are some."""
    task, original = judge.task, judge.original
    if task.test is None:
        return ("validation" if original.scores is not None else None), original.scores, chosen.scores
    before, after = (task.score(Session(candidate.onnx).predict, "test") for candidate in (original, chosen))
    return "test", before, after


def _side(candidate: Candidate, scores: Scores | None, profile: Analysis, timing: Timing) -> dict[str, Any]:
    times = timing.to_dict()["milliseconds"]
    return {
        "bytes": candidate.bytes,
        "parameters": profile.parameters,
        "macs": profile.macs,
        "score": None if scores is None else float(np.mean(scores)),
        "latency": {"median": times["median"], "low": times["p10"], "high": times["p90"]},
        "memory": timing.memory,
    }


def _drop(drop: Drop | None, part: str | None) -> dict[str, Any] | None:
    return None if drop is None else asdict(drop) | {"part": part}


def _layers(profiles: tuple[Analysis, Analysis], coded: Mapping[str, int]) -> list[dict[str, Any]]:
    """Every layer of the original beside what became of it; its bytes afterwards are those in the file."""
    before, after = ({row.name: row for row in profile.layers if row.kind != "operator"} for profile in profiles)
    rows = []
    for name, row in before.items():
        now = after.get(name)
        left = None if now is None else _measures(now) | {"bytes": sum(coded.get(tensor, 0) for tensor in now.tensors)}
        rows.append({"name": name, "kind": row.kind, "before": _measures(row), "after": left})
    return rows


def _measures(row: Row) -> dict[str, Any]:
    return {"parameters": row.parameters, "macs": row.macs, "bytes": row.bytes, "ms": row.ms}


def _verdict(pair: Pair, profile: Analysis) -> str:
    """What was measured; where there is no gain, also which layers take the time."""
    if pair.low is not None and pair.low > 1:
        return pair.reason
    slowest = sorted((row for row in profile.layers if row.kind != "operator"), key=lambda row: -(row.ms or 0.0))[:3]
    return f"{pair.reason}; not faster: most of the time goes to {', '.join(row.name for row in slowest)}"


def _publish(out: Path, copies: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    """Everything is first written beside its place; then renamed, which needs no space. What was there stays until then."""
    new = out / ".new"
    try:
        with writing(out):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            for key, source in copies.items():
                shutil.copyfile(source, new / FILES[key])
            for key, text in texts.items():
                (new / FILES[key]).write_text(text, encoding="utf-8")
            for name in FILES.values():  # the result is the last
                os.replace(new / name, out / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
