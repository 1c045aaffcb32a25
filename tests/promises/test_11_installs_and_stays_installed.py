"""Promise 11: the base install is light and silent, and a missing extra is one line with the command that installs it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SILENT = """
import socket, sys
def refuse(*args, **options):
    raise AssertionError(f"a connection: {args}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_little_beyond_torch():
    seconds = python(
        "import time, torch; begin = time.process_time(); import multum; multum.Task, multum.compress; print(time.process_time() - begin)"
    )
    assert float(seconds) < 2.0


def test_working_opens_no_connection(tmp_path):
    code = f"""{SILENT}
import torch, multum
task = multum.Task(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.rand(4, 8))
result = multum.compress(task, multum.quantize.WeightOnly())
multum.save(result, {str(tmp_path / "a.mip")!r}, task)
multum.export(multum.load({str(tmp_path / "a.mip")!r}), {str(tmp_path / "a.onnx")!r}, inputs=[task.example])
print(multum.Session({str(tmp_path / "a.onnx")!r}).predict(task.example).shape)
"""
    assert "4, 2" in python(code)


def test_a_missing_extra_is_one_line_with_its_command(tmp_path):
    code = f"""
import sys
sys.modules["openvino"] = None
import torch, multum
multum.export(multum.capture(torch.nn.Linear(2, 2), torch.rand(2, 2)), {str(tmp_path / "a.onnx")!r}, inputs=[torch.rand(2, 2)])
try:
    multum.Session({str(tmp_path / "a.onnx")!r}, "openvino")
except multum.MultumError as error:
    print(type(error).__name__, error)
"""
    said = python(code)
    assert re.search(r"MissingExtra .*pip install [\"']?multum\[\w+\]", said, re.DOTALL), said


def test_nothing_is_reported_home():
    words = re.compile(r"telemetry|analytics|phone.?home|urlopen|requests\.(get|post)", re.IGNORECASE)
    found = [str(path) for path in (ROOT / "multum").rglob("*.py") if words.search(path.read_text())]
    assert not found
