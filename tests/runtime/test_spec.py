"""Structures: flattening and rebuilding nested values, and refusing what does not fit."""

import json
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multum.errors import GraphError
from multum.graph.spec import check, flatten, spec_of, unflatten

leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.integers(0, 9).map(lambda i: np.full(1, i)))
values = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
    ),
    max_leaves=12,
)


@given(values)
def test_a_value_survives_flattening_and_rebuilding(value):
    spec = json.loads(json.dumps(spec_of(value)))
    leaves = flatten(value, spec)
    assert check(spec) == len(leaves)
    assert all(isinstance(one, np.ndarray) for one in leaves)
    assert unflatten(leaves, spec) == value
    assert spec_of(unflatten(leaves, spec)) == spec


def test_named_tuples_and_mappings_become_plain():
    Pair = namedtuple("Pair", "a b")
    a, b, c = torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)
    value = Pair(a, OrderedDict(x=b, y=[c]))
    spec = spec_of(value)
    assert spec == {
        "t": "tuple",
        "c": [{"t": "tensor"}, {"t": "dict", "k": ["x", "y"], "c": [{"t": "tensor"}, {"t": "list", "c": [{"t": "tensor"}]}]}],
    }
    rebuilt = unflatten([a, b, c], spec)
    assert type(rebuilt) is tuple
    assert type(rebuilt[1]) is dict
    assert rebuilt[1]["y"][0] is c


def test_dicts_are_matched_by_name_and_lists_stand_for_tuples():
    a, b = torch.ones(1), torch.zeros(1)
    assert flatten({"y": b, "x": a}, spec_of({"x": a, "y": b})) == [a, b]
    assert flatten([a, b], spec_of((a, b))) == [a, b]


@pytest.mark.parametrize(
    ("example", "value", "given_text", "expected_text"),
    [
        ((torch.ones(1), torch.ones(1)), (torch.ones(1),), "inputs is a tuple of 1.", "a tuple of 2"),
        ({"ids": torch.ones(1)}, {"idz": torch.ones(1)}, "inputs is a dict with the keys ['idz'].", "a dict with the keys ['ids']"),
        ({"ids": torch.ones(2, 3)}, torch.ones(2, 3), "inputs is a tensor [2, 3].", "a dict with the keys ['ids']"),
        ((torch.ones(1), 3), (torch.ones(1), 4), "inputs[1] is 4.", "3, as at capture"),
        ((torch.ones(1), True), (torch.ones(1), 1), "inputs[1] is 1.", "True, as at capture"),
        ({"a": None}, {"a": torch.ones(1)}, "inputs['a'] is a tensor [1].", "None, as at capture"),
        ([torch.ones(1)], [2.5], "inputs[0] is 2.5.", "a tensor"),
    ],
)
def test_a_wrong_structure_says_where(example, value, given_text, expected_text):
    with pytest.raises(GraphError) as error:
        flatten(value, spec_of(example), "inputs")
    assert error.value.given == given_text
    assert error.value.expected == expected_text
    assert error.value.do


def test_values_without_a_structure_are_refused():
    with pytest.raises(GraphError, match="inputs\\[0\\] is a set"):
        spec_of(({torch.ones(1)},), "inputs")
    with pytest.raises(GraphError, match="keys other than strings"):
        spec_of({1.5: torch.ones(1)})


@pytest.mark.parametrize(
    "spec",
    [
        None,
        [],
        {},
        {"t": "tuple"},
        {"t": "list", "c": "ab"},
        {"t": "dict", "k": ["a"], "c": []},
        {"t": "dict", "k": ["a", "a"], "c": [{"t": "none"}, {"t": "none"}]},
        {"t": "dict", "k": [["a"]], "c": [{"t": "none"}]},
        {"t": "const", "v": [1]},
        {"t": "tuple", "c": [{"t": "exec"}]},
    ],
)
def test_a_damaged_spec_is_refused(spec):
    with pytest.raises(GraphError, match="describes no structure"):
        check(spec)


def test_a_deep_spec_is_refused():
    spec = {"t": "tensor"}
    for _ in range(65):
        spec = {"t": "list", "c": [spec]}
    with pytest.raises(GraphError, match="nested more than 64 deep"):
        check(spec)


@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_leaves_must_fit(count):
    with pytest.raises(GraphError, match=f"{count} tensors"):
        unflatten([torch.ones(1)] * count, spec_of((torch.ones(1), torch.ones(1))))
