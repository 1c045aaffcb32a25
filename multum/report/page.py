"""The HTML page of a result: one file that needs nothing else and asks nothing of the network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import FileError
from .layers import bars, limit_bars
from .plot import tradeoff
from .words import amount, duration, size, spread, statistics, steps, tiles

VERSION = 1  # of result.json


def report(folder: str | Path) -> Path:
    """Writes `report.html` from the `result.json` and `candidates.json` in `folder`, and returns its path.

    Raises FileError when they are missing, damaged, or of a newer version.
    """
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(folder)
    result, candidates = read(folder / "result.json"), read(folder / "candidates.json")
    if result.get("result") != VERSION:
        raise FileError(f"{folder / 'result.json'} is of version {result.get('result')!r}.", f"version {VERSION}", "update multum")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size, "amount": amount, "duration": duration, "spread": spread}
    try:
        page = environment.get_template("page.html").render(
            r=result,
            tiles=tiles(result),
            sentence=statistics(result),
            recipe_text=yaml.safe_dump(result["recipe"], sort_keys=False).strip(),
            steps=steps(result["records"]),
            plot=tradeoff(result, candidates["candidates"]),
            failed=[row for row in candidates["candidates"] if row.get("error")],
            bars=bars(result["layers"]),
            limits=result.get("limits"),
            limit_bars=limit_bars(result.get("limits")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"The result in {folder} is damaged ({type(error).__name__}: {error}).", "files as a search leaves them") from error
    return _write(folder / "report.html", page)


def read(path: Path) -> dict[str, Any]:
    """A JSON file with one object. Raises FileError when there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"There is no {path}.", "a folder that compress or run has written", "multum compress TASK --out FOLDER") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read: {error}", "a file as compress or run writes it") from error
    if not isinstance(data, dict):
        raise FileError(f"{path} holds a {type(data).__name__}.", "one object")
    return data


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FileError(f"{path} cannot be written: {error.strerror or error}.", do="free some space, or choose another place") from error
    return path
