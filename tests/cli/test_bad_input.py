"""What cannot be used is refused with what was given, what was expected and what to do: code 2, nothing on stdout, no traceback."""

from pathlib import Path

import pytest

from .conftest import Finished, multum


def refused(*words: object, says: tuple[str, ...]) -> None:
    done = multum(*words)
    assert done.exit_code == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr
    for part in says:
        assert part in done.stderr


def test_an_ambiguous_size(task_file: Path) -> None:
    refused(
        "compress", task_file, "--size", "10", says=("The size '10' is ambiguous.", "Expected: a share of the original", "Do: write '1/10'")
    )


def test_a_target_that_asks_for_nothing(task_file: Path, tmp_path: Path) -> None:
    refused(
        "compress",
        task_file,
        "--minutes",
        "1",
        "--out",
        tmp_path,
        says=("The target asks for nothing.", "Expected: a size, a speed or a largest drop"),
    )


def test_a_missing_task_file(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("")
    refused("analyze", tmp_path / "tusk.py", says=("There is no task file", "near: ", "task.py"))


def test_a_task_function_that_is_not_there_or_gives_something_else(task_file: Path) -> None:
    refused("analyze", f"{task_file}:tusk", says=("has no function 'tusk'", "near: 'task'"))
    refused("analyze", f"{task_file}:nothing", says=("nothing()", "returned a NoneType", "Expected: a multum.Task"))


def test_a_drop_without_data_to_measure_it(task_file: Path, tmp_path: Path) -> None:
    refused(
        "compress",
        f"{task_file}:untested",
        "--max-drop",
        "1",
        "--out",
        tmp_path,
        says=("has no validation data", "Expected: an iterable of"),
    )


def test_nan_in_the_data(task_file: Path, tmp_path: Path) -> None:
    refused(
        "compress", f"{task_file}:nan", "--size", "1/2", "--out", tmp_path, says=("The validation data holds NaN", "Do: check how the data")
    )
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- prune.Chanels", ("There is no step 'prune.Chanels'", "prune.Channels", "Do: list them with: multum steps")),
        ("- prune.Channels: {ration: 0.5}", ("has no option 'ration'", "'ratio'")),
        ("- prune.Channels: {ratio: half}", ("ratio is 'half'", "float, such as 0.5")),
        ("prune.Channels", ("A recipe is a str.", "Expected: a list of steps")),
        ("- quantize.WeightOnly\n- prune.Channels", ("comes after", "Expected: shapes before weights before number formats")),
        ("- prune.Channels: {include: secnd}", ("'secnd' matches no layer", "'second'")),
        ("[", ("cannot be read",)),
    ],
)
def test_a_recipe_that_is_wrong(text: str, says: tuple[str, ...], task_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    refused("run", recipe, task_file, "--out", tmp_path / "out", says=says)
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_recipe_that_is_not_there(task_file: Path, tmp_path: Path) -> None:
    refused("run", tmp_path / "none.yaml", task_file, says=("none.yaml", "cannot be read", "Expected: a YAML list of steps"))


def test_a_step_without_the_data_it_needs(task_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- distill.Logits\n")
    (tmp_path / "bare.py").write_text("import torch, multum\ndef task(): return multum.Task(torch.nn.Linear(2, 2), torch.zeros(1, 2))\n")
    refused("run", recipe, tmp_path / "bare.py", says=("distill.Logits needs `train`", "Expected: Task(..., train=...)"))


@pytest.mark.parametrize("command", ["bench", "export"])
def test_a_model_file_that_is_missing_or_cut_off(command: str, finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "original.onnx").write_bytes((finished.out / "original.onnx").read_bytes())
    refused(command, tmp_path / "none.mip", says=("none.mip",))
    whole = (finished.out / "model.mip").read_bytes()
    (tmp_path / "cut.mip").write_bytes(whole[: len(whole) // 2])
    refused(command, tmp_path / "cut.mip", says=("cut.mip",))


def test_a_benchmark_without_a_yardstick(tmp_path: Path) -> None:
    refused("bench", tmp_path / "model.mip", says=("There is no", "original.onnx", "Do: name it: --original original.onnx"))


def test_an_unknown_format_and_step(finished: Finished) -> None:
    refused("export", finished.out / "model.mip", "--to", "tflite", says=("There is no export to 'tflite'.", "Expected: one of onnx"))
    refused("steps", "prune.Chanels", says=("There is no step 'prune.Chanels'", "prune.Channels"))


def test_a_report_of_an_empty_folder(tmp_path: Path) -> None:
    refused("report", tmp_path, says=("There is no", "result.json", "Do: multum compress TASK --out FOLDER"))
