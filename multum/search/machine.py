"""The machine that a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def machine() -> dict[str, str | int]:
    """Processor, system and the versions of what ran."""
    row: dict[str, str | int] = {"processor": _processor(), "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1}
    row |= {"system": platform.platform(terse=True), "python": platform.python_version()}
    for package in ("torch", "onnxruntime", "openvino"):
        try:
            row[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return row


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
