"""The examples load, their data are what they say, and their networks score what is written beside them."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

import multum
from multum.task import Batches

EXAMPLES = Path(__file__).parents[2] / "examples"


def loaded(name: str) -> multum.Task:
    try:
        return multum.load_task(EXAMPLES / name / "task.py")
    except FileNotFoundError as error:  # a package or a download that this machine does not have
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def fashion() -> multum.Task:
    return loaded("fashion_mnist")


@pytest.fixture(scope="module")
def reuters() -> multum.Task:
    pytest.importorskip("transformers")
    return loaded("reuters")


@pytest.fixture(scope="module")
def photos() -> multum.Task:
    pytest.importorskip("PIL")
    return loaded("imagenet_photos")


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The file of an example that the test names, imported as the example itself would."""
    path = EXAMPLES / request.param
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    for neighbour in path.parent.glob("*.py"):  # that of another example may have the same name
        monkeypatch.delitem(sys.modules, neighbour.stem, raising=False)
    description = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    yield module
    for neighbour in path.parent.glob("*.py"):
        sys.modules.pop(neighbour.stem, None)


def samples(data: Batches) -> int:
    return sum(len(targets) for _, targets in data)


def test_fashion_mnist_scores_what_its_training_recorded(fashion: multum.Task) -> None:
    recorded = json.loads((EXAMPLES / "fashion_mnist" / "resnet20.json").read_text())
    with torch.inference_mode():
        assert fashion.metric(fashion.model, fashion.test).mean().item() == pytest.approx(recorded["test"], abs=0.02)
        assert fashion.metric(fashion.model, fashion.validation).mean().item() == pytest.approx(recorded["held_out"], abs=0.04)
    assert abs(recorded["test_5_more"] - recorded["test"]) < 0.1, "the network had not converged"


def test_fashion_mnist_data_are_whole_and_augmented_anew_each_pass(fashion: multum.Task) -> None:
    assert [samples(part) for part in (fashion.calibration, fashion.validation, fashion.test)] == [512, 5_000, 10_000]
    assert fashion.model(fashion.example).shape == (8, 10)
    first, second = (next(iter(fashion.train))[0] for _ in range(2))
    assert first.shape == (128, 1, 28, 28)
    assert not torch.equal(first, second)
    same, again = (next(iter(fashion.calibration))[0] for _ in range(2))
    assert torch.equal(same, again)


@pytest.mark.parametrize("module", ["fashion_mnist/data.py"], indirect=True)
def test_fashion_mnist_shifts_by_at_most_two_pixels(module: ModuleType) -> None:
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 14, 14] = 1.0
    batches = module.Batches(image.repeat(200, 1, 1, 1), torch.zeros(200), 200, augment=True)
    moved, _ = next(iter(batches))
    _, _, y, x = (moved == 1.0).nonzero(as_tuple=True)
    assert set(y.tolist()) == {12, 13, 14, 15, 16}
    assert set(x.tolist()) == {11, 12, 13, 14, 15, 16}  # 13 is 14 flipped


@pytest.mark.parametrize("module", ["fashion_mnist/data.py", "imagenet_photos/data.py"], indirect=True)
def test_data_out_of_reach_say_what_was_tried(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MULTUM_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setattr(module, "ADDRESS", f"file://{tmp_path}/nowhere/", raising=False)
    with pytest.raises(FileNotFoundError, match=rf"apt-get and dpkg-deb are not.*Install the Debian package {module.PACKAGE}"):
        module.directory()
    assert not list(tmp_path.rglob("*.*"))


def test_reuters_classifies_as_well_as_its_head_did_when_trained(reuters: multum.Task) -> None:
    assert [samples(part) for part in (reuters.train, reuters.calibration, reuters.validation, reuters.test)] == [4_985, 200, 500, 2_189]
    assert reuters.example["input_ids"].shape == reuters.example["attention_mask"].shape == (8, 64)
    assert reuters.model(**reuters.example).shape == (8, 8)
    with torch.inference_mode():
        hits = reuters.metric(lambda inputs: reuters.model(**inputs), list(islice(reuters.test, 4)))
    assert hits.shape == (200,)
    assert hits.mean().item() == pytest.approx(95.5, abs=0.51)  # 191 of 200, give or take one


def test_reuters_is_captured_with_its_inputs_by_name(reuters: multum.Task) -> None:
    inputs, _ = next(iter(reuters.validation))
    few = {name: value[:3] for name, value in inputs.items()}
    with torch.inference_mode():
        assert torch.allclose(reuters.original(**few), reuters.model(**few), atol=1e-5)


@pytest.mark.parametrize("module", ["imagenet_photos/task.py"], indirect=True)
def test_photos_are_never_seen_before_they_are_judged(photos: multum.Task, module: ModuleType) -> None:
    def rows(data: Batches) -> set[int]:
        return set(torch.cat([chosen for _, chosen in data]).tolist())

    train, calibration, validation, test = map(rows, (photos.train, photos.calibration, photos.validation, photos.test))
    judged = rows(module.agreement_data())
    assert [len(part) for part in (train, calibration, validation, test, judged)] == [385, 256, 97, 123, 314]
    assert calibration <= train
    assert test <= judged
    assert not train & validation
    assert not judged & (train | validation)


def test_photos_are_recognized_as_often_as_with_the_published_weights(photos: multum.Task) -> None:
    with torch.inference_mode():
        hits = photos.metric(photos.model, photos.test)
    assert hits.shape == (123,)
    assert hits.mean().item() == pytest.approx(84.55, abs=0.82)  # 104 of 123, give or take one


def test_pictures_without_a_name_are_scored_by_agreement(photos: multum.Task) -> None:
    batch = next(iter(photos.validation))
    assert photos.metric(photos.model, [batch]).tolist() == [100.0] * 16
    assert photos.metric(lambda images: -photos.model(images), [batch]).tolist() == [0.0] * 16
