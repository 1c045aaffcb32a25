"""Any ONNX file in a `.mip` file: every operator and every bit comes back, and what is no such file is refused."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import multum
from multum.errors import FileError
from multum.pack import mip, pack, read, unpack
from multum.pack import onnx as packed_onnx

TYPES = [n for n in TensorProto.DataType.values() if n != TensorProto.UNDEFINED]
NEAT = sorted(packed_onnx._TYPES)


def raw_tensor(name: str, kind: int, dims: list[int], raw: bytes) -> TensorProto:
    return TensorProto(name=name, data_type=kind, dims=dims, raw_data=raw)


def model(*tensors: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes if nodes is not None else [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        list(tensors),
        doc_string="a graph",
    )
    made = helper.make_model(graph, producer_name="somebody")
    made.metadata_props.add(key="author", value="me")
    return made


def there_and_back(made: onnx.ModelProto, folder: Path) -> bytes:
    (folder / "a.onnx").write_bytes(made.SerializeToString())
    size = pack(folder / "a.onnx", folder / "a.mip")
    assert size == (folder / "a.mip").stat().st_size
    assert unpack(folder / "a.mip", folder / "b.onnx") == (folder / "b.onnx").stat().st_size
    return (folder / "b.onnx").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tensors_of_every_type_shape_and_content_come_back(tmp_path_factory, draws):
    folder = tmp_path_factory.mktemp("x")
    tensors = []
    for name in draws.draw(st.lists(st.sampled_from(["w", "w", "b", "model", "a\\b", "", "../x", "ä" * 600]), max_size=5)):
        kind, dims = draws.draw(st.sampled_from(TYPES)), draws.draw(st.lists(st.integers(0, 40), max_size=3))
        count = int(np.prod(dims))
        width = np.dtype(packed_onnx._TYPES[kind]).itemsize if kind in packed_onnx._TYPES else 4
        length = -(-count // 2) if kind in packed_onnx._NIBBLES else count * width
        length += draws.draw(st.sampled_from([0, 0, 0, 1, -1]))  # sometimes another than the shape says
        raw = np.random.default_rng(draws.draw(st.integers(0, 99))).integers(0, draws.draw(st.sampled_from([2, 256])), max(0, length))
        tensors.append(raw_tensor(name, kind, dims, raw.astype(np.uint8).tobytes()))
    made = model(*tensors)
    assert there_and_back(made, folder) == made.SerializeToString()


@pytest.mark.parametrize("kind", NEAT)
def test_numbers_of_a_list_are_the_same_numbers(tmp_path, kind):
    tensor = numpy_helper.from_array(np.arange(300).reshape(3, 100).astype(helper.tensor_dtype_to_np_dtype(kind)), "w")
    as_list = helper.make_tensor("w", kind, [3, 100], numpy_helper.to_array(tensor).reshape(-1).astype(object).tolist())
    assert not as_list.HasField("raw_data")
    back = onnx.ModelProto.FromString(there_and_back(model(as_list), tmp_path))
    assert back.graph.initializer[0].data_type == kind
    assert numpy_helper.to_array(back.graph.initializer[0]).tobytes() == numpy_helper.to_array(tensor).tobytes()


def test_tensors_in_attributes_subgraphs_functions_and_sparse_ones_are_coded(tmp_path):
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(64, 64)).round().astype(np.float32), "w")
    constant = helper.make_node("Constant", [], ["c"], value=weight)
    inner = helper.make_graph([constant], "then", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [64, 64])])
    choice = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    made = model(weight, nodes=[choice])
    made.functions.append(helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 20)]))
    made.graph.sparse_initializer.add(values=weight, indices=numpy_helper.from_array(np.arange(4096), "i"), dims=[9999])
    assert there_and_back(made, tmp_path) == made.SerializeToString()
    assert len(read(tmp_path / "a.mip")[1]) == 7
    assert (tmp_path / "a.mip").stat().st_size < made.ByteSize() / 10


def test_a_network_computes_the_same_and_is_smaller(tmp_path):
    from onnxruntime import InferenceSession

    from multum.testing.zoo import ZOO

    network, example = ZOO["resnet"]()
    multum.export(multum.capture(network, example), tmp_path / "a.onnx")
    multum.pack(tmp_path / "a.onnx", tmp_path / "a.mip")
    multum.unpack(tmp_path / "a.mip", tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()
    assert (tmp_path / "a.mip").stat().st_size < 0.85 * (tmp_path / "a.onnx").stat().st_size
    session = InferenceSession(tmp_path / "b.onnx")
    assert np.isfinite(session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]).all()


def test_external_data_come_into_the_file_and_large_models_go_out_with_them(tmp_path, monkeypatch):
    weights = [numpy_helper.from_array(np.random.default_rng(i).normal(size=(60, 50)).astype(np.float32), f"w{i}") for i in range(3)]
    made = model(*weights)
    onnx.save_model(made, tmp_path / "a.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    pack(tmp_path / "a.onnx", tmp_path / "a.mip")
    os.unlink(tmp_path / "w.bin")
    unpack(tmp_path / "a.mip", tmp_path / "one.onnx")
    monkeypatch.setattr(packed_onnx, "_LARGEST", 1000)
    size = unpack(tmp_path / "a.mip", tmp_path / "two.onnx")
    assert size == (tmp_path / "two.onnx").stat().st_size + (tmp_path / "two.onnx.data").stat().st_size
    for name in ("one.onnx", "two.onnx"):
        back = onnx.load(tmp_path / name)
        assert [t.raw_data for t in back.graph.initializer] == [t.raw_data for t in weights]


def test_what_is_no_onnx_file_is_refused(tmp_path):
    for content in (b"", b"hello world, not a model", b"\xff" * 100, onnx.ModelProto(ir_version=3).SerializeToString()):
        (tmp_path / "a.onnx").write_bytes(content)
        with pytest.raises(FileError, match="not an ONNX file"):
            pack(tmp_path / "a.onnx", tmp_path / "a.mip")
    with pytest.raises(FileError, match=r"(?s)none\.onnx cannot be read: No such file"):
        pack(tmp_path / "none.onnx", tmp_path / "a.mip")
    assert not (tmp_path / "a.mip").exists()


def test_external_data_outside_the_folder_are_refused(tmp_path):
    tensor = TensorProto(name="w", data_type=1, dims=[25], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    (tmp_path / "a.onnx").write_bytes(model(tensor).SerializeToString())
    with pytest.raises(FileError):
        pack(tmp_path / "a.onnx", tmp_path / "a.mip")


def test_nothing_is_written_over_itself(tmp_path):
    (tmp_path / "a.onnx").write_bytes(model().SerializeToString())
    with pytest.raises(FileError, match="written over"):
        pack(tmp_path / "a.onnx", tmp_path / "a.onnx")
    pack(tmp_path / "a.onnx", tmp_path / "a.mip")
    with pytest.raises(FileError, match="written over"):
        unpack(tmp_path / "a.mip", tmp_path / "a.mip")


def test_files_of_the_other_kind_say_what_to_do(tmp_path):
    from torch import nn, randn

    multum.save(multum.capture(nn.Linear(3, 3), randn(2, 3)), tmp_path / "graph.mip")
    with pytest.raises(FileError, match="multum export"):
        unpack(tmp_path / "graph.mip", tmp_path / "x.onnx")
    (tmp_path / "a.onnx").write_bytes(model().SerializeToString())
    pack(tmp_path / "a.onnx", tmp_path / "a.mip")
    with pytest.raises(FileError, match="multum unpack"):
        multum.load(tmp_path / "a.mip")


@pytest.mark.parametrize(
    "change",
    [
        lambda meta, arrays: meta.pop("taken"),
        lambda meta, arrays: meta.update(taken=5),
        lambda meta, arrays: meta.update(taken="0"),
        lambda meta, arrays: meta.update(taken="11"),
        lambda meta, arrays: arrays.pop("model"),
        lambda meta, arrays: arrays.pop("w"),
        lambda meta, arrays: arrays.update(model=np.frombuffer(b"\xff\xff\xff", np.uint8)),
        lambda meta, arrays: arrays.update(w=arrays["w"][:5]),
        lambda meta, arrays: arrays.update(w=arrays["w"].astype(np.float16)),
        lambda meta, arrays: arrays.update(w=arrays["w"].reshape(50, 2)),
        lambda meta, arrays: arrays.update(other=arrays["w"]),
    ],
)
def test_forged_files_are_refused(tmp_path, change):
    made = model(numpy_helper.from_array(np.arange(100, dtype=np.float32), "w"))
    there_and_back(made, tmp_path)
    meta, found = mip.read(tmp_path / "a.mip")
    arrays = dict(found)
    change(meta, arrays)
    mip.write(tmp_path / "a.mip", meta, arrays)
    with pytest.raises(FileError):
        unpack(tmp_path / "a.mip", tmp_path / "c.onnx")
    assert not (tmp_path / "c.onnx").exists()


def test_progress_is_told_and_json_can_hold_the_description(tmp_path):
    (tmp_path / "a.onnx").write_bytes(model(numpy_helper.from_array(np.zeros((50, 50), np.float32), "w")).SerializeToString())
    told: list[str] = []
    pack(tmp_path / "a.onnx", tmp_path / "a.mip", tell=told.append)
    assert any("MB" in line for line in told)
    assert "read back" in told[-1]
    assert json.dumps(mip.read_meta(tmp_path / "a.mip")) == '{"format": "onnx", "taken": "1"}'
