"""Axes as atoms, sums and products; and the groups of channels that the rules find in captured graphs."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from multum import capture
from multum.errors import GraphError
from multum.graph import surgery
from multum.graph.axes import Groups, axes
from multum.graph.axis import Axis, atoms, cut, find, fix, kept, mask, places, product, total, unify
from multum.testing import ZOO


def sizes(axis: Axis) -> list[int]:
    return [atom.size for atom in atoms(axis)]


def test_an_atom_takes_the_shape_of_what_it_is_unified_with() -> None:
    width, heads, depth = Axis(768), Axis(12), Axis(64)
    unify(width, product([heads, depth]))
    assert list(atoms(width)) == [heads, depth]


def test_two_products_are_refined_to_what_both_can_be_made_of() -> None:
    a, b = product([Axis(12), Axis(64)]), product([Axis(24), Axis(32)])
    unify(a, b)
    assert sizes(a) == sizes(b) == [12, 2, 32]
    assert find(a) is find(b)


def test_two_sums_are_cut_wherever_one_has_a_boundary() -> None:
    a, b = total([Axis(3), Axis(5)]), total([Axis(4), Axis(4)])
    unify(a, b)
    assert sizes(a) == sizes(b) == [3, 1, 4]


def test_a_leading_factor_over_equal_parts_makes_the_parts_one() -> None:
    q, k, v, each = Axis(24), Axis(24), Axis(24), product([Axis(4), Axis(6)])
    unify(product([Axis(3), each]), total([q, k, v]))
    assert list(atoms(q)) == list(atoms(k)) == list(atoms(v)) == list(atoms(each))


def test_parts_that_do_not_line_up_are_fixed() -> None:
    a, b = product([Axis(4), Axis(9)]), product([Axis(6), Axis(6)])
    unify(a, b)
    assert all("line up" in str(atom.reason) for axis in (a, b) for atom in atoms(axis))


def test_a_reason_spreads_to_everything_that_an_axis_is_bound_to() -> None:
    whole, part, other = Axis(6), Axis(2), Axis(4)
    fix(whole, "because")
    unify(whole, total([part, other]))
    assert (part.reason, other.reason) == ("because", "because")


def test_masks_sizes_and_places_of_sums_and_products_by_hand() -> None:
    a, b = Axis(2), Axis(3)
    axis = total([product([a, b]), b])  # (a0b0 a0b1 a0b2 a1b0 a1b1 a1b2) + (b0 b1 b2)
    keep = {a: [1], b: [0, 2]}
    assert mask(axis, keep.get).tolist() == [False, False, False, True, False, True, True, False, True]
    assert kept(axis, keep.get) == 4
    assert places(axis, a).tolist() == [0, 0, 0, 1, 1, 1, -1, -1, -1]
    assert places(axis, b).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_cutting_a_product_between_whole_rows_cuts_its_first_factor() -> None:
    lead, row = Axis(4), Axis(5)
    first, second = cut(product([lead, row]), [15])
    assert (first.size, second.size, sizes(lead)) == (15, 5, [3, 1])
    assert list(atoms(first))[1] is row


Layout = Axis | tuple[str, list["Layout"]]


@st.composite
def layouts(draw: st.DrawFn, size: int) -> Layout:
    """An axis of this size, as a plan of sums and products over atoms of its own."""
    kind = draw(st.sampled_from(["atom", "sum", "product"])) if size > 1 else "atom"
    divisors = [divisor for divisor in range(2, size) if size % divisor == 0]
    if kind == "sum":
        at = draw(st.integers(1, size - 1))
        return "sum", [draw(layouts(at)), draw(layouts(size - at))]
    if kind == "product" and divisors:
        lead = draw(st.sampled_from(divisors))
        return "product", [draw(layouts(lead)), draw(layouts(size // lead))]
    return Axis(size)


def built(layout: Layout) -> Axis:
    if isinstance(layout, Axis):
        return layout
    return (total if layout[0] == "sum" else product)([built(part) for part in layout[1]])


def leaves(layout: Layout) -> list[Axis]:
    return [layout] if isinstance(layout, Axis) else [leaf for part in layout[1] for leaf in leaves(part)]


def left(layout: Layout, keep: dict[Axis, list[int]]) -> Tensor:
    """The mask, put together from the atoms that the layout had at first, whatever they are bound to now."""
    if isinstance(layout, Axis):
        return mask(layout, keep.get)
    first, second = (left(part, keep) for part in layout[1])
    return torch.cat([first, second]) if layout[0] == "sum" else (first[:, None] & second).flatten()


@given(st.data())
def test_axes_that_were_unified_lose_the_same_indices_whatever_is_cut(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([6, 8, 12, 24, 36]))
    drawn = [data.draw(layouts(size)) for _ in range(3)]
    a, b, c = map(built, drawn)
    unify(a, b)
    unify(c, b)
    free = dict.fromkeys(atom for layout in drawn for leaf in leaves(layout) for atom in atoms(leaf) if not atom.reason and atom.size > 1)
    keep = {atom: sorted(data.draw(st.sets(st.integers(0, atom.size - 1), min_size=1))) for atom in free}
    expected = mask(a, keep.get)
    assert int(expected.sum()) == kept(a, keep.get)
    for layout in drawn:
        assert torch.equal(left(layout, keep), expected)


class Attention(nn.Module):
    """A residual stream under layer norm, one fused projection, and a gated perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.qkv, self.out = nn.Linear(5, 24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.norm, self.gate, self.down = nn.LayerNorm(24), nn.Linear(24, 64), nn.Linear(32, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        gate, up = self.gate(x).chunk(2, -1)
        return self.head(x + self.down(F.silu(gate) * up))


@pytest.fixture(scope="module")
def attention() -> Groups:
    return axes(capture(Attention(), torch.zeros(2, 7, 5)))


def test_a_residual_stream_under_layer_norm_is_fixed_and_says_so(attention: Groups) -> None:
    (stream,) = attention.outputs("inp")
    assert stream.reason == "layer_norm normalizes over it"
    assert set(stream.producers) == {"inp", "out", "down", "norm"}


def test_heads_and_their_width_are_two_groups_of_a_fused_projection(attention: Groups) -> None:
    heads, width = attention["qkv:out[1]"], attention["qkv:out[2]"]  # [0] are q, k and v
    assert (heads.size, width.size, heads.reason, width.reason) == (4, 6, None, None)
    assert attention.factors(heads) == [attention["qkv:out[0]"], width]
    assert heads.consumers == width.consumers == ("out",)
    assert (attention.cofactor(heads), attention.cofactor(width)) == (6, 4)


def test_both_halves_of_a_gated_layer_are_one_group(attention: Groups) -> None:
    (half,) = attention.outputs("gate")
    assert (half.size, half.reason) == (32, None)
    assert attention.places("gate.weight", 0, half).tolist() == [*range(32), *range(32)]


class Grouped(nn.Module):
    """Two key-value heads, each for three query heads; `how` shares them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.attn = how, nn.ModuleDict({"q": nn.Linear(8, 24), "k": nn.Linear(8, 8), "v": nn.Linear(8, 8), "o": nn.Linear(24, 8)})

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.attn[name](x).view(b, n, -1, 4).transpose(1, 2) for name in "qkv")
        if self.how == "operator":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (self.shared(part) for part in (k, v))
            y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.attn["o"](y.transpose(1, 2).reshape(b, n, 24))

    def shared(self, x: Tensor) -> Tensor:
        b, h, n, w = x.shape
        if self.how == "interleave":
            return x.repeat_interleave(3, 1)
        return (x[:, :, None].expand(b, h, 3, n, w) if self.how == "expand" else x[:, :, None].repeat(1, 1, 3, 1, 1)).reshape(
            b, 3 * h, n, w
        )


@pytest.mark.parametrize("how", ["operator", "expand", "interleave", "repeat"])
def test_shared_key_value_heads_and_the_query_heads_of_each_are_groups(how: str) -> None:
    model, x = Grouped(how).eval(), torch.randn(2, 5, 8)
    graph = capture(model, x)
    groups = axes(graph)
    heads, queries, _, _ = (group for group in groups if not group.reason)
    assert [(group.kind, group.size, group.block) for group in (heads, queries)] == [("heads", 2, "attn"), ("queries", 3, "attn")]
    assert heads.producers == ("attn.q", "attn.k", "attn.v")
    assert queries.producers == ("attn.q",)
    surgery.cut(graph, {heads.name: [1], queries.name: [0, 2]})
    assert {name: tuple(graph.tensor(f"attn.{name}.weight").shape) for name in "qkvo"} == {
        "q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8),
    }  # fmt: skip
    with torch.no_grad():  # of the whole, what the other query heads give is not read
        read = torch.zeros(2, 3, 4)
        read[1, [0, 2]] = 1
        model.attn["o"].weight *= read.flatten()
        torch.testing.assert_close(graph(x), model(x))


def test_kinds_tell_heads_neurons_and_the_residual_stream_apart(attention: Groups) -> None:
    assert [(group.name, group.kind) for group in attention if not group.reason or group.name == "inp:out"] == [
        ("inp:out", "stream"), ("qkv:out[1]", "heads"), ("qkv:out[2]", "width"), ("gate:out", "neurons"),
    ]  # fmt: skip


def test_kinds_of_convolutions_and_recurrent_layers() -> None:
    kinds = {name: {group.name: group.kind for group in axes(capture(*ZOO[name]()))} for name in ("resnet", "lstm", "densenet")}
    assert kinds["resnet"]["0.0:out"] == kinds["resnet"]["2.conv2:out"] == "stream"
    assert kinds["resnet"]["1.conv1.0:out"] == kinds["densenet"]["layers.0.2:out"] == "channels"
    assert kinds["lstm"]["rnn.weight_ih_l0:out[1]"] == "units"


def test_neurons_stay_neurons_when_a_function_of_them_is_added_to_them() -> None:
    class Gelu(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[1](y * torch.tanh(y + 0.04 * y**3))

    assert next(iter(axes(capture(Gelu(nn.Linear(3, 8), nn.Linear(8, 2)), torch.zeros(2, 3))))).kind == "neurons"


def test_an_unknown_group_names_the_near_misses(attention: Groups) -> None:
    with pytest.raises(GraphError, match=r"'qkv:out\[1\]'"):
        attention["qkv:out"]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cummax(self.b(torch.special.i0(torch.cdist(self.a(x), self.a(x)) @ self.a(x))), -1)[0])


def test_an_operator_without_a_rule_is_named(attention: Groups) -> None:
    groups = axes(capture(Odd(), torch.zeros(2, 5, 4)))
    assert [group.reason for group in groups.outputs("a")] == ["the operator aten.cdist.default has no rule"]
    assert [group.reason for group in groups.outputs("b")] == ["cummax runs along it"]


def test_a_deep_network_is_analysed_in_linear_time() -> None:
    def seconds(blocks: int) -> float:
        graph = capture(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(blocks))), torch.zeros(2, 8))
        start = time.process_time()
        axes(graph)
        return time.process_time() - start

    assert seconds(150) < 1
