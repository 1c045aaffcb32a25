"""Sessions: both engines, structures in and out, and every wrong file or input refused with a reason."""

import importlib
import threading

import numpy as np
import pytest
import torch

from multum.errors import ExportError, FileError, GraphError, MissingExtra, MultumError
from multum.graph.spec import spec_of
from multum.runtime import Session, engines

needs_openvino = pytest.mark.skipif("openvino" not in engines.installed(), reason="openvino is not installed")
both = pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])


@both
def test_a_plain_model_takes_and_gives_tensors(linear, engine):
    session = Session(linear(), engine)
    x = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    assert torch.equal(session(x), torch.tensor([[2.0, 0.0, 1.0, 0.0]]))
    assert torch.equal(session(x.numpy()), session(x))
    assert torch.equal(session.predict(x.repeat(3, 1)), session(x).repeat(3, 1))
    assert session.engine == engine


@both
def test_without_a_structure_inputs_go_by_position_or_by_their_own_names(two, engine):
    session = Session(two(), engine)
    a, ids = torch.zeros(2, 3), torch.tensor([4, 5])
    for outputs in (session(a, ids), session.predict((a, ids)), session.predict({"ids": ids, "a": a})):
        assert isinstance(outputs, tuple)
        assert torch.equal(outputs[0], torch.ones(2, 3))
        assert torch.equal(outputs[1], torch.tensor([8, 10]))


@both
def test_the_structure_of_the_original_comes_back(two, engine):
    a, ids = torch.zeros(2, 3), torch.tensor([4, 5])
    inputs = spec_of(((), {"pair": (a, None), "ids": ids, "mode": "fast"}))
    outputs = spec_of({"logits": a, "more": [ids, 7]})
    session = Session(two({"inputs": inputs, "outputs": outputs}), engine)
    result = session(mode="fast", ids=ids, pair=(a, None))
    assert list(result) == ["logits", "more"]
    assert torch.equal(result["logits"], a + 1)
    assert torch.equal(result["more"][0], ids * 2)
    assert result["more"][1] == 7


@both
def test_views_gradients_and_scalars_are_taken(linear, engine):
    session = Session(linear(), engine)
    x = torch.arange(8.0).reshape(4, 2).t().requires_grad_()
    assert not x.is_contiguous()
    assert torch.equal(session(x), 2 * x)


@both
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 5), "The input 'x' has the shape [2, 5].\nExpected: [any, 4]"),
        (torch.zeros(4), "The input 'x' has the shape [4].\nExpected: [any, 4]"),
        (
            torch.zeros(1, 4, dtype=torch.float64),
            "The input 'x' is of type float64.\nExpected: float32\nDo: convert it: x.to(torch.float32)",
        ),
        (torch.zeros(1, 4, dtype=torch.bfloat16), "The input 'x' is of type bfloat16.\nExpected: float32"),
        ((torch.zeros(1, 4), torch.zeros(1, 4)), "inputs[0] is a tuple of 2.\nExpected: a tuple of 1"),
        ({"y": torch.zeros(1, 4)}, "inputs[1] is a dict with the keys ['y'].\nExpected: a dict with the keys ['x']"),
        (3.0, "inputs[0][0] is 3.0.\nExpected: a tensor"),
    ],
)
def test_wrong_inputs_are_refused(linear, engine, inputs, message):
    with pytest.raises(GraphError) as error:
        Session(linear(), engine).predict(inputs)
    assert str(error.value).startswith(message)


@both
def test_what_the_engine_refuses_is_an_error_of_ours(linear, engine):
    session = Session(linear(), engine)
    session._ports = (engines.Port("x", "float32", None),)  # as if the file said nothing of its shape
    with pytest.raises(ExportError, match=f"{engine} fails on the model: ."):
        session(torch.zeros(2, 5))


@both
def test_a_file_that_is_not_onnx_is_refused(tmp_path, engine):
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a model at all")
    with pytest.raises(FileError, match=f"The file bad.onnx cannot be loaded by {engine}: ."):
        Session(path, engine)


def test_auto_refuses_a_damaged_file_too(linear, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(linear(depth=4).read_bytes()[:200])
    with pytest.raises(FileError, match=r"cut\.onnx cannot be loaded"):
        Session(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileError, match="There is no file"):
        Session(tmp_path / "none.onnx")
    with pytest.raises(FileError, match=r"neither an \.onnx nor a \.mip file"):
        Session(tmp_path / "model.pt")


def test_a_mip_file_is_exported_in_memory(linear, tmp_path, monkeypatch):
    pack, export = (importlib.import_module(f"multum.{name}") for name in ("pack", "export"))
    path = tmp_path / "model.mip"
    path.write_bytes(b"packed")
    monkeypatch.setattr(pack, "load", lambda file: file.read_bytes(), raising=False)
    monkeypatch.setattr(export, "to_onnx_bytes", lambda graph: linear().read_bytes() if graph == b"packed" else None)
    assert torch.equal(Session(path)(torch.ones(1, 4)), torch.full((1, 4), 2.0))
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_engines_and_thread_counts_are_refused(linear):
    with pytest.raises(MultumError, match=r"There is no engine 'onnx'.\nExpected: .*\nDo: use 'onnxruntime'"):
        Session(linear(), "onnx")
    for threads in (-1, 10_000):
        with pytest.raises(MultumError, match=f"{threads} threads are asked for"):
            Session(linear(), "onnxruntime", threads=threads)


def test_an_engine_that_is_not_installed_names_the_extra(linear, monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda: ["onnxruntime"])
    with pytest.raises(MissingExtra, match=r"The engine 'openvino' needs the package 'openvino'.*\nDo: pip install .multum\[openvino\]"):
        Session(linear(), "openvino")


TENSOR = {"t": "tensor"}
NONE = {"t": "dict", "k": [], "c": []}


@pytest.mark.parametrize(
    "io",
    [
        "{",
        "[1]",
        "[" * 100_000,
        {"inputs": {"t": "tuple", "c": [{"t": "tuple", "c": [TENSOR] * 2}, NONE]}},
        {"inputs": {"t": "tuple", "c": [{"t": "tuple", "c": [TENSOR] * 3}, NONE]}, "outputs": {"t": "tuple", "c": [TENSOR] * 2}},
        {"inputs": {"t": "tuple", "c": [{"t": "tuple", "c": [TENSOR] * 2}, NONE]}, "outputs": TENSOR},
        {"inputs": {"t": "tuple", "c": [TENSOR] * 2}, "outputs": {"t": "tuple", "c": [TENSOR] * 2}},
    ],
)
def test_a_structure_that_does_not_fit_the_file_is_refused(two, io):
    with pytest.raises(FileError, match="does not fit its model"):
        Session(two(io), "onnxruntime")


@needs_openvino
def test_auto_times_both_and_keeps_the_faster(linear):
    session = Session(linear(width=64, depth=2))
    assert session.engine == "auto"
    x = torch.rand(2, 64)
    assert torch.equal(session(x), 4 * x)
    assert session.timings.keys() == {"onnxruntime", "openvino"}
    assert session.engine == min(session.timings, key=session.timings.get)
    assert session.skipped == {}
    first = dict(session.timings)
    session(x)
    assert session.timings == first


class Broken:
    """An engine that answers with something else, or not at all."""

    def __init__(self, engine, answer):
        self.engine, self.answer = engine, answer
        self.inputs, self.outputs, self.io = engine.inputs, engine.outputs, engine.io

    def run(self, arrays):
        return self.answer(self.engine.run(arrays))


@needs_openvino
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda outputs: [one * 1.5 for one in outputs], "its outputs differ by 50% from those of onnxruntime"),
        (lambda outputs: 1 / 0, "openvino fails on the model: division by zero"),
    ],
)
def test_auto_leaves_out_an_engine_that_is_wrong_and_says_so(linear, monkeypatch, answer, reason):
    genuine = engines.OpenVino
    monkeypatch.setitem(engines.ENGINES, "openvino", lambda *options: Broken(genuine(*options), answer))
    session = Session(linear())
    x = torch.ones(1, 4)
    assert torch.equal(session(x), 2 * x)
    assert session.engine == "onnxruntime"
    assert session.skipped == {"openvino": reason}


@both
def test_one_session_serves_several_threads(linear, engine):
    session = Session(linear(width=64, depth=8, scale=1.0), engine, threads=1, spin=False)
    wrong: list[int] = []

    def serve(value: int) -> None:
        for _ in range(50):
            if not torch.equal(session(torch.full((4, 64), float(value))), torch.full((4, 64), float(value))):
                wrong.append(value)

    workers = [threading.Thread(target=serve, args=(value,)) for value in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@both
def test_outputs_of_one_call_survive_the_next(linear, engine):
    session = Session(linear(), engine)
    first = session(torch.ones(1, 4))
    session(torch.zeros(1, 4))
    assert torch.equal(first, torch.full((1, 4), 2.0))
    first += 1  # writable


def test_both_engines_see_the_same_ports(two):
    path = str(two())
    ports = {name: engines.open_engine(name, path, 1).inputs for name in engines.installed()}
    assert set(ports.values()) == {(engines.Port("a", "float32", (None, 3)), engines.Port("ids", "int64", (None,)))}
    content = engines.open_engine("onnxruntime", two().read_bytes(), 1)
    assert np.array_equal(content.run([np.zeros((1, 3), np.float32), np.ones(1, np.int64)])[1], [2])
