"""Random damage against the reader of `.mip` files: `python bench/fuzz.py file out/bench/fuzz/file -max_total_time=3600`.

Guided by coverage (atheris must be installed: python -m pip install atheris); all other options are libFuzzer's. Checksums are made
right again after every change, so that what lies behind them is met. `coder` decodes a stream alone, of any dtype and shape; `file` reads
the header, every tensor and the graph of a whole file. Anything but a MultumError, more than 20 seconds for one input, or more
memory than twice what is declared ends it, and the input is kept.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["multum.pack", "multum.graph"], exclude=["multum.pack.words1"]):
    import numpy as np
    import torch
    from torch import nn

    import multum
    from multum.errors import MultumError
    from multum.pack import coder, mip

DECLARED = 64 << 20  # bytes that an input of `coder` may declare
SLACK = 16 << 20  # bytes that the tables of the coder take, however little is declared
FILE = Path(tempfile.mkdtemp()) / "fuzz.mip"


def stream(data: bytes) -> None:
    """Three bytes: dtype, number of arrays, dimensions; then two bytes for each dimension; the rest is the stream."""
    if len(data) < 3:
        return
    dtype, count, rank = coder.DTYPES[data[0] % len(coder.DTYPES)], 1 + data[1] % 3, data[2] % 4
    size = 2 * count * rank
    dims = [1 + n % 300 for n in struct.unpack(f"<{count * rank}H", data[3 : 3 + size])] if len(data) >= 3 + size else []
    shapes = [tuple(dims[i * rank : (i + 1) * rank]) for i in range(count)]
    declared = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape in shapes)
    if declared > DECLARED:
        return
    tracemalloc.start()
    try:
        arrays = coder.decode_all(data[3 + size :], dtype, shapes)
    except MultumError:
        arrays = []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(array.dtype == dtype and array.shape == shape for array, shape in zip(arrays, shapes, strict=False))
    assert peak < 2 * declared + SLACK, f"{peak} bytes for {declared} that were declared"


def file(data: bytes) -> None:
    """Four bytes: the length of the header; the header, plain JSON; the rest are the streams."""
    if len(data) < 4:
        return
    length = struct.unpack("<I", data[:4])[0] % (len(data) - 3)
    plain, streams = data[4 : 4 + length], data[4 + length :]
    packed = coder.compress(plain, words=True)
    head, lengths = mip._HEAD.pack(mip.MAGIC, mip.MAJOR, mip.MINOR), struct.pack("<II", len(packed), len(plain))
    FILE.write_bytes(head + streams + packed + lengths + struct.pack("<I", zlib.crc32(head + packed + lengths)))
    with suppress(MultumError):
        multum.load(FILE)


def seeds(what: str, folder: Path) -> None:
    """Inputs to begin with: what a small network writes."""
    folder.mkdir(parents=True, exist_ok=True)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    task = multum.Task(network, torch.randn(2, 1, 8, 8))
    recipes = ([multum.quantize.Half()], [multum.quantize.WeightOnly(bits=4)], [multum.prune.Weights(ratio=0.8), multum.quantize.Half()])
    for number, recipe in enumerate(recipes):
        path = folder / "seed.mip"
        multum.save(multum.compress(task, multum.Recipe(recipe)), path, task)
        whole = path.read_bytes()
        path.unlink()
        packed, plain, _ = mip._FOOT.unpack(whole[-mip._FOOT.size :])
        body = len(whole) - mip._FOOT.size - packed
        header = coder.decompress(whole[body : body + packed], plain, words=True)
        if what == "file":
            (folder / f"seed{number}").write_bytes(struct.pack("<I", len(header)) + header + whole[mip._HEAD.size : body])
            continue
        table, offset = json.loads(header), mip._HEAD.size
        for place, (length, _, dtype) in enumerate(table["streams"]):
            shapes = [shape for shape, where in zip(table["shapes"], table["places"], strict=True) if where == place][:1]
            lead = bytes([coder.DTYPES.index(dtype), 0, len(shapes[0]) % 4])
            dims = struct.pack(f"<{len(shapes[0][:3])}H", *(n - 1 for n in shapes[0][:3]))
            (folder / f"seed{number}_{place}").write_bytes(lead + dims + whole[offset : offset + length])
            offset += length


if __name__ == "__main__":
    target = {"coder": stream, "file": file}[sys.argv[1]]
    seeds(sys.argv[1], Path(sys.argv[2]))
    atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={sys.argv[2]}/"], target)
    atheris.Fuzz()
