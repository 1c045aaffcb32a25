"""Light networks take and give what the original does, and the score knows relatives from strangers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multum import Task, compress, distill
from multum.errors import StepError
from multum.graph import capture
from multum.search import students
from multum.task import call

torch.set_num_threads(1)


class Reader(nn.Module):
    """Keyword inputs and a dict of outputs, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        mask = attention_mask[..., None].float()
        return {"logits": self.head((self.words(input_ids) * mask).sum(1) / mask.sum(1))}


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


IDS = {"attention_mask": torch.tensor([[1, 1, 0, 0]] * 6), "input_ids": torch.randint(0, 50, (6, 4))}
CASES: dict[str, tuple[nn.Module, Any, list[str]]] = {
    "images": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)), torch.randn(6, 3, 8, 8), ["mobile"]),
    "signals": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(40, 5)), torch.randn(6, 3, 12), ["conv1d", "gru"]),
    "sequences": (Steps(), torch.randn(6, 12, 5), ["conv1d", "gru"]),
    "texts": (Reader(), IDS, ["bag", "gru"]),
    "features": (nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(6, 7), ["mlp"]),
}


@pytest.mark.parametrize("kind", CASES)
def test_light_networks_take_the_place_of_the_original(kind: str) -> None:
    model, example, names = CASES[kind]
    task = Task(model, example, train=[(example, None)])
    assert distill.zoo(task) == names
    wanted = [(tensor.shape, key) for key, tensor in _leaves(call(model, example))]
    for name in names:
        found = capture(distill.light(name, task).eval(), example)
        assert [(tensor.shape, key) for key, tensor in _leaves(call(found, example))] == wanted
        compress(task, distill.Logits(), student=found)


def _leaves(outputs: Any) -> list[tuple[str, Tensor]]:
    return list(outputs.items()) if isinstance(outputs, dict) else [("", outputs)]


def test_masked_words_do_not_count() -> None:
    task = Task(*CASES["texts"][:2])
    bag, other = distill.light("bag", task), {**IDS, "input_ids": IDS["input_ids"].clone()}
    other["input_ids"][:, 2:] = 7
    torch.testing.assert_close(call(bag, IDS)["logits"], call(bag, other)["logits"])


@pytest.mark.parametrize(
    ("model", "example", "name", "said"),
    [
        (nn.Linear(7, 2), torch.randn(2, 7), "mobile", "no light network 'mobile' for features"),
        (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), "mobile", r"one output \[n, classes\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(32, 2)), torch.randn(2, 4, 2, 2, 2), "mobile", "no light network for inputs"),
    ],
)
def test_what_no_light_network_does_is_said(model: nn.Module, example: Tensor, name: str, said: str) -> None:
    with pytest.raises(StepError, match=said):
        distill.light(name, Task(model, example))


def test_affinity_is_one_for_the_original_whatever_its_scale_and_less_for_strangers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(64, 7)
    task = Task(model, x, calibration=[(x, None)])
    scaled = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 2))
    scaled.load_state_dict({name: 3 * value for name, value in model.state_dict().items()})
    noise = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 2))
    nn.init.normal_(noise[0].weight, 0, 5)
    found = [distill.affinity(capture(one, x), task) for one in (model, scaled, noise)]
    assert found[:2] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert 0 < found[2] < 0.97


@pytest.mark.slow  # a dozen processes start
def test_candidates_have_size_time_and_score() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 32, 5), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 32, 5), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    x = torch.randn(16, 3, 40)
    found = students(Task(model.eval(), x, calibration=[(x, None)]), widths=(0.5,), seconds=2.0)
    rows = {row.name: row for row in found.rows}
    assert next(iter(rows)) == "original"
    assert set(rows) == {"original", "width 0.5, depth 1", "conv1d", "gru"}
    assert all("nothing to cut" in reason for reason in found.skipped.values())
    assert set(found.skipped) == {"width 1, depth 0.5", "width 0.5, depth 0.5"}
    assert rows["width 0.5, depth 1"].bytes < rows["original"].bytes
    assert rows["original"].score == pytest.approx(1.0)
    assert all(row.ms > 0 for row in found.rows)
    assert [row["name"] for row in found.to_data()["rows"]] == [row.name for row in found.rows]


def test_the_table_shows_candidates_and_why_others_are_left_out() -> None:
    from rich.console import Console

    from multum.report import terminal

    rows = [{"name": "original", "parameters": 2000, "bytes": 8000, "ms": 2.0, "score": 1.0}]
    rows += [{"name": "gru", "parameters": 200, "bytes": 900, "ms": 0.5, "score": 0.25}]
    console = Console(width=100, record=True)
    console.print(terminal.students({"rows": rows, "skipped": {"width 0.5, depth 1": "nothing to cut"}}))
    text = console.export_text()
    assert "4.00x" in text
    assert "left out: width 0.5, depth 1: nothing to cut" in text
