"""Parts that run in a row as one ONNX file, which stops behind the first whose answer is sure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..graph import Graph
from .onnx import to_onnx_bytes
from .verify import verify


def nested(parts: Sequence[Graph], threshold: float) -> bytes:
    """Parts of `graph.split` with an answer each, logits [n, classes], as one file: each part lies in an `If` of the one before.

    A sample's answer is that of the first part in which its largest probability reaches the threshold; a batch is computed on until that
    is so for all its samples. Every part is compared with its graph (see `verify`). Raises ExportError.
    """
    from onnx import compose, load_model_from_string

    models, name = [], ""
    for place, part in enumerate(parts):
        content = to_onnx_bytes(part)
        verify(part, content)
        model = load_model_from_string(content)
        name = model.graph.output[0].name
        models.append(compose.add_prefix(model, f"part{place}_", rename_inputs=place > 0))
    for before, model in reversed(list(pairwise(models))):
        _join(before.graph, model.graph, threshold)
    whole = models[0]
    whole.graph.node[-1].output[0] = whole.graph.output[0].name = name
    versions = {one.domain: one for model in models for one in model.opset_import}
    del whole.opset_import[:], whole.metadata_props[:]
    whole.opset_import.extend(versions.values())
    whole.functions.extend(one for model in models[1:] for one in model.functions)
    io = {"inputs": parts[0].inputs, "outputs": parts[-1].outputs}
    whole.metadata_props.add(key="multum.io", value=json.dumps(io))
    result: bytes = whole.SerializeToString()
    return result


def _join(graph: Any, rest: Any, threshold: float) -> None:
    """Puts `rest`, whose inputs are all outputs of `graph` but the first, behind `graph`, for when that is not sure; in place."""
    from onnx import helper, numpy_helper

    node = helper.make_node
    answer, *carried = (port.name for port in graph.output)
    final, kind = rest.output[0].name, graph.output[0].type
    names = {port.name: name for port, name in zip(rest.input, carried, strict=True)}
    for reader in rest.node:
        _rename(reader, names)
    made = {what: f"{answer}_{what}" for what in ("probabilities", "largest", "sure", "least", "done", "threshold", "last", "own")}
    graph.initializer.append(numpy_helper.from_array(np.array(threshold, np.float32), made["threshold"]))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), made["last"]))
    graph.node.extend(
        [
            node("Softmax", [answer], [made["probabilities"]], axis=-1),
            node("ReduceMax", [made["probabilities"], made["last"]], [made["largest"]]),
            node("GreaterOrEqual", [made["largest"], made["threshold"]], [made["sure"]]),
            node("ReduceMin", [made["largest"]], [made["least"]], keepdims=0),
            node("GreaterOrEqual", [made["least"], made["threshold"]], [made["done"]]),
        ]
    )
    here = helper.make_graph([node("Identity", [answer], [made["own"]])], "sure", [], [helper.make_value_info(made["own"], kind)])
    rest.node.append(node("Where", [made["sure"], answer, final], [f"{final}_chosen"]))
    there = helper.make_graph(rest.node, "unsure", [], [helper.make_value_info(f"{final}_chosen", kind)], rest.initializer)
    graph.node.append(node("If", [made["done"]], [f"{answer}_or_later"], then_branch=here, else_branch=there))
    del graph.output[:]
    graph.output.append(helper.make_value_info(f"{answer}_or_later", kind))


def _rename(reader: Any, names: dict[str, str]) -> None:
    """Lets a node, and what lies in it, read other values."""
    reader.input[:] = [names.get(name, name) for name in reader.input]
    for attribute in reader.attribute:
        for inner in attribute.g.node:
            _rename(inner, names)
