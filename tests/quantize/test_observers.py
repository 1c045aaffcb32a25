"""Ranges: the histogram, what is read from it, and what calibration refuses."""

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from multum.errors import MultumError, StepError, TaskError
from multum.graph import layers
from multum.graph.watch import Watch
from multum.quantize import Static
from multum.quantize.grid import affine, unsigned
from multum.quantize.observers import Histogram, average, entropy, importances, minmax, mse, observe, percentile
from multum.step import compress
from multum.task import Task, calibration

GRID = unsigned(8)


def histogram(*batches: Tensor) -> Histogram:
    made = Histogram()
    for batch in batches:
        made.update(batch)
    return made


def test_bins_by_hand() -> None:
    h = histogram(torch.tensor([0.0, 1.0, -1.0, 1.0]))
    assert h.width == 2**-11  # the least power of two with which 4,096 bins reach beyond 1
    centres, counts = h.bins()
    assert counts.tolist() == [1, 1, 2]
    assert centres.tolist() == pytest.approx([-1, 0, 1], abs=h.width)
    assert (h.low, h.high) == (-1, 1)


def test_bins_widen_and_keep_their_counts() -> None:
    h = histogram(torch.tensor([0.001, -0.001]), torch.tensor([500.0]))
    assert h.width == 2**-3
    assert h.counts.sum() == 3
    assert minmax(h, GRID) == (pytest.approx(-0.001), 500)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40), st.integers(1, 39))
def test_the_order_and_the_batches_do_not_matter(values: list[float], where: int) -> None:
    whole = histogram(torch.tensor(values))
    parts = histogram(*(part for part in (torch.tensor(values[where:]), torch.tensor(values[:where]))))
    assert whole.width == parts.width
    assert torch.equal(whole.counts, parts.counts)


def test_percentile_leaves_out_one_in_ten_thousand() -> None:
    values = torch.cat([torch.linspace(0, 1, 100_000), torch.full((3,), 1000.0)])
    low, high = percentile(histogram(values), GRID)
    assert low == pytest.approx(0, abs=0.3)  # a bin is 0.25 wide
    assert high == pytest.approx(1, abs=0.3)
    assert minmax(histogram(values), GRID)[1] == 1000


def test_the_mse_range_keeps_even_values_and_clips_a_rare_one() -> None:
    even = torch.linspace(-1, 3, 10_000)
    assert mse(histogram(even), GRID) == pytest.approx((-1, 3), abs=0.05)
    rare = torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([3.0])])
    low, high = mse(histogram(rare), unsigned(3))
    assert low == 0
    assert high < 1.5


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_mse_range_is_no_worse_than_all(bits: int) -> None:
    x = torch.distributions.Laplace(0.3, 1).sample((20_000,)).numpy()
    grid, errors = unsigned(bits), []
    for low, high in (mse(histogram(torch.from_numpy(x)), grid), (x.min(), x.max())):
        scale, zero = affine(float(low), float(high), grid)
        errors.append(np.square(scale * (np.clip(np.rint(x / scale) + zero, grid.low, grid.high) - zero) - x).sum())
    assert errors[0] <= errors[1] * 1.001


class Data:
    """Batches that are made as they are asked for."""

    def __init__(self, count: int, value: float | None = None, size: int = 4):
        self.count, self.value, self.size, self.made = count, value, size, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.count):
            self.made += 1
            x = torch.randn(self.size, 3, 16, 16) if self.value is None else torch.full((self.size, 3, 16, 16), self.value)
            yield x, torch.zeros(self.size)


def task(data: Data, model: nn.Module | None = None) -> Task:
    return Task(model or nn.Conv2d(3, 4, 3), torch.randn(2, 3, 16, 16), calibration=data)


def observed(data: Data, samples: int = 10_000, model: nn.Module | None = None) -> list[Histogram]:
    made = task(data, model)
    graph = made.original.copy()
    return list(observe(graph, [node for node in graph.fx.nodes if node.op == "call_function"], made, samples).values())


def test_ranges_are_those_of_the_results() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    torch.manual_seed(0)
    batches = [x for x, _ in Data(3)]
    torch.manual_seed(0)
    conv, relu = observed(Data(3), model=model)
    with torch.no_grad():
        results = torch.cat([model[0](x) for x in batches])
    assert (conv.low, conv.high) == pytest.approx((results.min().item(), results.max().item()))
    assert relu.low == 0
    assert conv.counts.sum() == relu.counts.sum() == results.numel()


def test_no_more_batches_are_made_than_needed() -> None:
    data = Data(100)
    observed(data, samples=10)
    assert data.made == 3  # of four samples each


def test_a_shuffling_loader_gives_the_same_samples_each_time_and_random_numbers_go_on_as_before() -> None:
    rows = torch.utils.data.TensorDataset(torch.randn(32, 3, 16, 16), torch.zeros(32))
    loader = torch.utils.data.DataLoader(rows, 4, shuffle=True)
    made = Task(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 16, 16), calibration=loader)
    torch.manual_seed(5)
    first, second = (torch.cat(list(calibration(made, 8))) for _ in range(2))
    assert torch.equal(first, second)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("count", [10, 200])
def test_memory_does_not_grow_with_the_number_of_batches(count: int) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Counted(Data):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal most
            for batch in super().__iter__():
                alive.append(weakref.ref(batch[0]))
                most = max(most, sum(ref() is not None for ref in alive))
                yield batch

    kept = observed(Counted(count, size=1))
    assert len(alive) == count
    assert most <= 2  # the batch at hand and the one before it
    assert sum(h.counts.numel() for h in kept) == 8192


def test_results_are_freed_after_their_last_use() -> None:
    made = task(Data(1), nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(6)]))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def see(node: object, value: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    graph = made.original.copy()
    Watch(graph, [n for n in graph.fx.nodes if n.op == "call_function"], see)(torch.randn(1, 3, 16, 16))
    assert len(alive) == 6
    assert most <= 2


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (Data(0), TaskError, "empty"),
        (Data(2, 0.5), TaskError, "one number"),
        (Data(2, size=0), TaskError, "empty"),
        (Data(2, float("nan")), TaskError, "NaN"),
    ],
    ids=["empty", "constant", "batches of none", "not a number"],
)
def test_data_that_tell_nothing_are_refused(data: Data, error: type[MultumError], words: str) -> None:
    with pytest.raises(error, match=words):
        observed(data)


def test_a_network_that_overflows_is_named() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x)

    with pytest.raises(StepError, match=r"log in '0' are NaN or infinite"):
        observed(Data(1), model=nn.Sequential(Root()))


def test_entropy_keeps_the_bulk_and_gives_up_a_far_value() -> None:
    x = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([50.0])])
    low, high = entropy(histogram(x), GRID)
    assert 3 < high < 12
    assert -6 < low < -2
    assert minmax(histogram(x), GRID)[1] == 50


def test_entropy_by_hand() -> None:
    # Two values on a grid of two integers: the whole range tells them apart, a smaller one does too but clips nothing less.
    h = histogram(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert entropy(h, unsigned(1)) == (0.0, 1.0)


def test_entropy_counts_what_it_clips() -> None:
    even = torch.linspace(0, 1, 20_001)[1:]  # all alike up to 1, where half of the values are
    assert entropy(histogram(torch.cat([even, 1 + 9 * even])), unsigned(2))[1] > 5


def test_how_many_samples_sufficed() -> None:
    random = torch.Generator().manual_seed(0)
    steady = [torch.rand(10, 100, generator=random) for _ in range(16)]
    assert found(steady).sufficed == 10
    late = [*steady[:8], *(5 * batch for batch in steady[8:])]
    assert found(late).sufficed == 160


def found(batches: list[Tensor]) -> Histogram:
    made = Task(nn.Sequential(nn.ReLU(), nn.Linear(100, 2)), batches[0], calibration=[(batch, 0) for batch in batches])
    node = next(node for node in made.original.fx.nodes if node.op == "call_function")
    return observe(made.original, [node], made, 10_000)[node]


def test_the_average_range_is_the_mean_over_the_batches_by_hand() -> None:
    h = Histogram()
    for batch in ([-1.0, 3.0], [-3.0, 1.0], [0.0, 5.0]):
        h.update(torch.tensor(batch))
    assert average(h, GRID) == (pytest.approx(-4 / 3), pytest.approx(3.0))


def test_values_count_as_much_as_the_weights_that_they_meet() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 3, bias=False))
    model[1].weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    x = torch.tensor([[1.0, 2.0], [1.0, 4.0]])
    task = Task(model.eval(), x, calibration=[(x, 0)])
    (layer,) = layers(task.original)
    value = layer.node.args[0]
    importance = importances(task.original, [value], [layer])
    torch.testing.assert_close(importance[value], torch.tensor([9.0, 5.0]) / 7)  # sums of squares by column, over their mean
    centres, counts = observe(task.original, [value], task, 8, importance)[value].bins()
    assert counts.tolist() == [pytest.approx(18 / 7), pytest.approx(5 / 7), pytest.approx(5 / 7)]
    assert centres.tolist() == pytest.approx([1.0, 2.0, 4.0], rel=1e-3)


def test_the_weighted_range_serves_the_channels_that_matter() -> None:
    """A large channel that weights hardly read makes the even range wide; the weighted one clips it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    model[0].weight.data[0] *= 50
    model[2].weight.data[:, 0] *= 1e-3
    x = torch.randn(64, 4, 5, 5)
    task = Task(model.eval(), x[:2], calibration=[(x, 0)])
    with torch.no_grad():
        wrong = [
            float((compress(task, Static(activation_bits=4, observer=observer)).graph(x) - task.original(x)).square().mean())
            for observer in ("mse", "weighted")
        ]
    assert wrong[1] < 0.5 * wrong[0]
