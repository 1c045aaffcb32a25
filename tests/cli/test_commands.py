"""Every command on a small real task: what it prints, what it writes, how it ends, and that a second start repeats nothing."""

import errno
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multum.pack import load
from multum.task import load_task

from .conftest import Finished, multum

ROOT = Path(__file__).parents[2]
FILES = {"model.mip", "model.onnx", "original.onnx", "recipe.yaml", "result.json", "candidates.json", "report.html", "work"}
evaluate = importlib.import_module("multum.search.evaluate")
finish = importlib.import_module("multum.search.finish")


def resumed(finished: Finished, tmp_path: Path) -> Path:
    """A copy of a finished folder in which another search can go on."""
    shutil.copytree(finished.out / "work", tmp_path / "work")
    return tmp_path


def test_compress_meets_the_target_and_writes_everything(finished: Finished) -> None:
    assert finished.exit_code == 0, finished.stderr
    assert {path.name for path in finished.out.iterdir()} == FILES
    result = finished.result
    assert result["met"] is True
    assert result["binding"] is None
    assert result["compressed"]["bytes"] == (finished.out / "model.mip").stat().st_size
    assert result["ratios"]["size"] == result["original"]["bytes"] / result["compressed"]["bytes"] >= 3
    assert result["drop"]["part"] == "test"
    assert result["drop"]["n"] == 600
    assert [row["name"] for row in result["layers"]] == ["first", "second", "last"]
    assert sum(row["before"]["parameters"] for row in result["layers"]) == result["original"]["parameters"] == 4996


def test_the_score_is_that_of_the_file(finished: Finished, task_file: Path) -> None:
    task, graph = load_task(task_file), load(finished.out / "model.mip")
    with torch.no_grad():
        scores = task.score(graph, "test")
    assert float(np.mean(scores)) == pytest.approx(finished.result["compressed"]["score"], abs=0.4)  # two samples of 600


def test_json_is_alone_on_stdout_and_progress_goes_to_stderr(finished: Finished) -> None:
    assert json.loads(finished.stdout) == finished.result
    assert "the user's file prints to stdout" in finished.stderr
    assert "x smaller" in finished.stderr


def test_every_key_of_the_result_is_documented(finished: Finished) -> None:
    page = (ROOT / "docs" / "result.md").read_text()
    result = finished.result
    named = {*result, *result["original"], *result["original"]["latency"], *result["bench"][0], *result["drop"], *result["records"][0]}
    named |= {f"ratios.{key}" for key in result["ratios"]} | set(result["ratios"]["speed"]) | set(result["layers"][0]["before"])
    missing = [key for key in named - {"ratios"} if f"`{key}`" not in page]
    assert not missing


def test_the_same_command_again_repeats_nothing(
    finished: Finished, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished candidate is made again")

    monkeypatch.setattr(evaluate, "compress", again)
    monkeypatch.setattr(evaluate, "quick", again)
    monkeypatch.setattr(evaluate, "alone", again)
    done = multum("compress", task_file, "--size", "1/3", "--max-drop", "5", out=resumed(finished, tmp_path))
    assert done.exit_code == 0, done.stderr
    assert done.result["recipe"] == finished.result["recipe"]
    assert "x smaller" not in done.stdout
    assert re.search(r"\d\.\dx +smaller", done.stdout)


def test_a_target_that_is_missed_ends_with_code_1_and_the_nearest_is_written(finished: Finished, task_file: Path, tmp_path: Path) -> None:
    done = multum("compress", task_file, "--size", "1/100", "--json", out=resumed(finished, tmp_path))
    assert done.exit_code == 1, done.stderr
    result = json.loads(done.stdout)
    assert result["met"] is False
    assert result["binding"] == "size"
    rows = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    assert result["compressed"]["bytes"] <= 1.1 * min(row["bytes"] for row in rows)
    assert "Target not met: size" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("first", [True, False])
def test_ctrl_c_writes_the_best_so_far_and_nothing_by_halves(
    first: bool, finished: Finished, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = resumed(finished, tmp_path)
    measure = evaluate.Workshop.measure
    calls: list[str] = []

    def interrupted(shop: Any, candidate: Any, original: Any) -> Any:
        calls.append(candidate.name)
        if first or len(calls) > 1:
            raise KeyboardInterrupt
        return measure(shop, candidate, original)

    monkeypatch.setattr(evaluate.Workshop, "measure", interrupted)
    done = multum("compress", task_file, "--max-drop", "50", "--json", out=out)
    assert done.exit_code == 130
    if first:
        assert {path.name for path in tmp_path.iterdir()} == {"work"}
        assert "the same command goes on from there" in done.stderr
        assert done.stdout == ""
    else:
        assert {path.name for path in tmp_path.iterdir()} == FILES
        assert done.result["stopped"] == "interrupted"


def test_a_full_disk_leaves_the_old_files_as_they_were(
    finished: Finished, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = resumed(finished, tmp_path)
    old = {}
    for name in ("model.mip", "result.json"):
        (out / name).write_bytes(b"old " + name.encode())
        old[name] = (out / name).read_bytes()

    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finish.shutil, "copyfile", full)
    done = multum("compress", task_file, "--size", "1/3", "--max-drop", "5", out=out)
    assert done.exit_code == 2
    assert "cannot be written: No space left on device" in done.stderr
    assert "Do: free some space" in done.stderr
    assert {name: (out / name).read_bytes() for name in old} == old
    assert {path.name for path in out.iterdir()} == {*old, "work"}


def test_run_carries_out_a_recipe(task_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- quantize.WeightOnly: {bits: 4}\n")
    done = multum("run", recipe, task_file, "--json", out=tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert done.result["recipe"] == [{"quantize.WeightOnly": {"bits": 4}}]
    assert done.result["target"] == {}
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "- quantize.WeightOnly:\n    bits: 4\n"


def test_a_dry_run_prints_the_plan_and_writes_nothing(task_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- prune.Channels: {ratio: 0.5}\n- distill.Logits\n- quantize.WeightOnly\n")
    done = multum("run", recipe, task_file, "--dry-run", "--json", out=tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    plans = json.loads(done.stdout)
    assert [plan["step"] for plan in plans] == ["prune.Channels", "distill.Logits", "quantize.WeightOnly"]
    assert any(change.get("of") == 64 for change in plans[0]["changes"].values())
    assert not (tmp_path / "out").exists()
    readable = multum("run", recipe, task_file, "--dry-run")
    assert "prune.Channels()" in readable.stdout
    assert "left alone" in readable.stdout


def test_bench_compares_with_the_original_beside_it(finished: Finished) -> None:
    done = multum("bench", finished.out / "model.mip", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["batch"] for row in found["rows"]} == {1, 8}
    assert all(row["ratio"] > 0 and row["original"] > 0 for row in found["rows"])
    assert "compressed on onnxruntime" in {timing["candidate"] for timing in found["timings"]}


def test_export_writes_a_file_that_was_run(finished: Finished, tmp_path: Path) -> None:
    done = multum("export", finished.out / "model.mip", "--to", "onnx", "-o", tmp_path / "small.onnx", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"path": str(tmp_path / "small.onnx"), "bytes": (tmp_path / "small.onnx").stat().st_size}


def test_report_writes_the_page_again(finished: Finished) -> None:
    (finished.out / "report.html").unlink()
    done = multum("report", finished.out)
    assert done.exit_code == 0
    assert done.stdout.replace("\n", "") == str(finished.out / "report.html")
    assert "Target met" in (finished.out / "report.html").read_text()


def test_analyze_shows_every_layer_and_the_total(task_file: Path) -> None:
    done = multum("analyze", task_file)
    assert done.exit_code == 0, done.stderr
    assert [name in done.stdout for name in ("first", "second", "last", "total")] == [True] * 4
    assert "5.00 k" in done.stdout


def test_analyze_shows_groups_and_why_some_stay(task_file: Path) -> None:
    done = multum("analyze", task_file, "--groups")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"first:out +neurons +64 +73 +first.weight +0 +\[64\]", done.stdout)
    assert re.search(r"last:out +channels +4 +it is an output of the model", done.stdout)
    assert "2 groups can be cut, 1 cannot." in done.stdout
    assert "neurons: a number that linear layers make" in done.stdout
    found = json.loads(multum("analyze", task_file, "--groups", "--json").stdout)
    assert [(row["name"], row["size"], len(row["members"])) for row in found["groups"]] == [
        ("first:out", 64, 3), ("second:out", 64, 3), ("last:out", 4, 2),
    ]  # fmt: skip


def test_steps_lists_each_with_its_options_and_source() -> None:
    rows = json.loads(multum("steps", "--json").stdout)
    assert {"prune.Channels", "quantize.Static", "quantize.WeightOnly", "distill.Logits"} <= {row["name"] for row in rows}
    for row in rows:
        assert row["source"]
        assert all(option["help"] for option in row["options"])
    done = multum("steps", "prune.Channels")
    assert "structure" in done.stdout
    assert re.search(r"ratio +0\.5 +share of the channels", done.stdout)
    assert "quantize" not in done.stdout


def test_help_lists_the_commands_and_is_fast() -> None:
    code = "import sys; from multum.cli import main; sys.argv[1:] = ['--help']\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("analyze", "compress", "run", "bench", "export", "report", "steps"):
        assert name in done.stdout
    assert "multum compress examples/fashion_mnist/task.py --size 1/10" in " ".join(multum("compress", "--help").stdout.split())


def test_a_real_process_keeps_stdout_clean(task_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "multum", "analyze", str(task_file), "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"]["parameters"] == 4996
    assert "the user's file prints to stdout" in done.stderr


def test_an_onnx_file_is_packed_and_unpacked(finished: Finished, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    shutil.copy(finished.out / "original.onnx", source)
    done = multum("pack", source, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] == (tmp_path / "model.mip").stat().st_size
    assert found["ratio"] == source.stat().st_size / found["bytes"] > 1.1
    assert "read back" in done.stderr
    again = multum("unpack", tmp_path / "model.mip", tmp_path / "back.onnx", "--json")
    assert json.loads(again.stdout) == {"path": str(tmp_path / "back.onnx"), "bytes": source.stat().st_size}
    assert (tmp_path / "back.onnx").read_bytes() == source.read_bytes()
    assert "smaller" in multum("pack", source, tmp_path / "other.mip").stdout


def test_the_bytes_of_a_file_are_shown_beside_their_bounds(finished: Finished, task_file: Path) -> None:
    found = json.loads(multum("analyze", "--size", finished.out / "model.mip", task_file, "--json").stdout)
    assert found == finished.result["limits"]
    assert 0 < found["total"]["bound"] < found["total"]["bytes"] < found["bytes"]

    def shown(*more: object) -> str:
        return " ".join(multum("analyze", "--size", finished.out / "model.mip", *more).stdout.split())

    readable, alone = shown(task_file), shown()
    assert "Gaussian" in readable
    assert "The bound holds for independent numbers" in readable
    assert "give the TASK too" in alone
    assert "How far from the limit" in (finished.out / "report.html").read_text()
