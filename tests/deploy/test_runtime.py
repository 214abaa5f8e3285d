"""Files as modules: the same answers as the integer module in both engines, and strangers' files as mere data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime, OpenVINO, load
from galago.errors import UserError
from integers import Exported, Zoo, deployed, images, shaken


@pytest.fixture(params=["onnx", "xml"])
def file(zoo: Exported, request: pytest.FixtureRequest) -> Path:
    return getattr(zoo, request.param)


def test_codes_equal_the_integer_modules(zoo: Exported, file: Path) -> None:
    image = images(64)
    expected, (_, found) = zoo.codes(image), load(file).look(image)
    assert found.keys() == expected.keys()
    for path, codes in expected.items():
        steps = (codes.int() - found[path].int()).abs()
        assert steps.max() <= 1, path
        assert (steps == 0).float().mean() >= 0.99, path


def test_outputs_and_decisions_equal_the_integer_modules(zoo: Exported, file: Path) -> None:
    image = images(64)
    with torch.no_grad():
        expected = zoo.integer(image)
    found = load(file)(image)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    assert (found - expected).abs().median() <= 1e-5
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.98


def test_looking_at_codes_changes_no_answer(zoo: Exported, file: Path) -> None:
    image, artifact = images(16), load(file)
    assert torch.equal(artifact.look(image)[0], artifact(image))


def test_an_answer_does_not_change_with_the_next_question(file: Path) -> None:
    artifact, first, second = load(file), images(4), images(4)
    kept = first.clone()
    answer = artifact(first)
    before = answer.clone()
    artifact(second)
    assert torch.equal(answer, before)
    assert torch.equal(first, kept)
    assert torch.equal(artifact(first), before)


def test_any_memory_layout_is_taken(file: Path) -> None:
    artifact, image = load(file, threads=1), images(4)
    assert torch.equal(artifact(image.to(memory_format=torch.channels_last)), artifact(image))
    with torch.inference_mode():
        assert torch.equal(artifact(image), artifact(image.clone()))


def test_openvino_computes_in_float32_unless_asked_for_bf16(zoo: Exported) -> None:
    image = images(8)
    assert torch.equal(OpenVINO(zoo.xml)(image), OpenVINO(zoo.xml, precision="f32")(image))
    assert OpenVINO(zoo.xml, precision="bf16")(image).shape == (8, 5)
    with pytest.raises(UserError, match="'f64' is not one of f32 and bf16"):
        OpenVINO(zoo.xml, precision="f64")


def test_openvino_reads_a_float_onnx_file_too(tmp_path: Path) -> None:
    image = images(4)
    export(deployed(shaken(Zoo())), image[:1], tmp_path / "float.onnx")
    first, second = OpenVINO(tmp_path / "float.onnx")(image), OnnxRuntime(tmp_path / "float.onnx")(image)
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 12, 12), (2, 3, 13, 12), (3, 12, 12)])
def test_images_of_another_shape_are_refused(file: Path, shape: tuple[int, ...]) -> None:
    given = "×".join(map(str, shape))
    with pytest.raises(UserError, match=f"takes images N×3×12×12, but was given {given}"):
        load(file)(torch.zeros(shape, dtype=torch.uint8))


def test_float_images_are_refused_where_bytes_are_expected(file: Path) -> None:
    with pytest.raises(UserError, match="raw uint8 images, but was given float32"):
        load(file)(torch.rand(1, 3, 12, 12))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.onnx: no such file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(UserError, match=r"none\.xml: no such file"):
        load(tmp_path / "none.xml")
    (tmp_path / "model.pt").touch()
    with pytest.raises(UserError, match="neither an ONNX file"):
        load(tmp_path / "model.pt")


def test_openvino_files_belong_together(zoo: Exported, tmp_path: Path) -> None:
    shutil.copy(zoo.xml, tmp_path / "alone.xml")
    with pytest.raises(UserError, match=r"alone\.bin, are not beside it"):
        load(tmp_path / "alone.xml")


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 100, b"<html>no model</html>"])
@pytest.mark.parametrize("suffix", ["onnx", "xml"])
def test_what_is_no_model_is_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"bad.{suffix}").write_bytes(content)
    (tmp_path / "bad.bin").write_bytes(b"")
    with pytest.raises(UserError, match="bad"):
        load(tmp_path / f"bad.{suffix}")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(zoo: Exported, file: Path, kept: float, tmp_path: Path) -> None:
    for path in (zoo.onnx, zoo.xml, zoo.xml.with_suffix(".bin")):
        shutil.copy(path, tmp_path / path.name)
    content = file.read_bytes()
    (tmp_path / file.name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match="zoo"):
        load(tmp_path / file.name)


def test_truncated_weights_are_refused(zoo: Exported, tmp_path: Path) -> None:
    shutil.copy(zoo.xml, tmp_path / "zoo.xml")
    (tmp_path / "zoo.bin").write_bytes(b"\x00" * 8)
    with pytest.raises(UserError, match="zoo"):
        load(tmp_path / "zoo.xml")


def foreign(node: onnx.NodeProto, path: Path, **names: str) -> Path:
    """A small file by somebody else."""
    image = helper.make_tensor_value_info(names.get("image", "image"), onnx.TensorProto.FLOAT, ["n", 3, 2, 2])
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "foreign", [image], outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("evil", 1), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    path = foreign(helper.make_node("Relu", ["x"], ["y"]), tmp_path / "foreign.onnx", image="x")
    for engine in (OnnxRuntime, OpenVINO):
        with pytest.raises(UserError, match="it takes x and gives y, but should take image"):
            engine(path)


@pytest.mark.parametrize("domain", ["evil", "com.microsoft"])
def test_operators_outside_the_standard_are_refused(domain: str, tmp_path: Path) -> None:
    node = helper.make_node("Run", ["image"], ["output", "decoded"], domain=domain)
    for engine in (OnnxRuntime, OpenVINO):
        with pytest.raises(UserError, match=f"refused: Run of '{domain}' is not a standard operator"):
            engine(foreign(node, tmp_path / "evil.onnx"))


def test_operators_outside_the_standard_are_found_inside_branches(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Run", ["image"], ["found"], domain="evil")],
        "inner",
        [],
        [helper.make_tensor_value_info("found", onnx.TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["image"], ["output"], then_branch=inner, else_branch=inner)
    with pytest.raises(UserError, match="Run of 'evil'"):
        load(foreign(node, tmp_path / "hidden.onnx"))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "folder/../../secret.bin"])
def test_weights_outside_the_files_folder_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\x00" * 64)
    path = foreign(helper.make_node("Add", ["image", "w"], ["output"]), tmp_path / "folder" / "reaching.onnx")
    model = onnx.load(path)
    weight = onnx.numpy_helper.from_array(np.zeros(12, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    model.graph.initializer.append(weight)
    path.write_bytes(model.SerializeToString())
    for engine in (OnnxRuntime, OpenVINO):
        with pytest.raises(UserError, match="refused: weights of w lie outside its folder"):
            engine(path)


@pytest.mark.parametrize("note", ["no json", "[1]", '{"stem.stream": "nowhere"}', '{"stem.stream": [1]}'])
def test_a_damaged_list_of_streams_is_refused(zoo: Exported, note: str, tmp_path: Path) -> None:
    model = onnx.load(zoo.onnx)
    next(entry for entry in model.metadata_props if entry.key == "galago.streams").value = note
    onnx.save(model, tmp_path / "damaged.onnx")
    artifact = load(tmp_path / "damaged.onnx")
    with pytest.raises(UserError, match="list of integer streams is damaged"):
        artifact.look(images(1))


def test_a_runtime_says_what_it_is(zoo: Exported) -> None:
    assert "zoo.onnx, N×3×12×12" in repr(load(zoo.onnx))
    assert list(load(zoo.onnx).parameters()) == []
