"""A file that teaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from galago.batch import Batch
from galago.deploy import openvino
from galago.deploy.onnx import export
from galago.deploy.teacher import FileTeacher
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify
from galago.method import Forward
from galago.probe import Deployed
from galago.testing import tiny_network


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return tiny_network().eval()


@pytest.fixture(scope="module")
def folder(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, data = tmp_path_factory.mktemp("files"), TinyImages()
    deployed = Deployed(network, data.normalize, classify()).eval()
    export(deployed, data.example(), made / "model.onnx")
    export(deployed, data.example(), made / "float.onnx", float_image=True)
    openvino.export(deployed, data.example(), made / "model.xml")
    return made


def teacher(path: Path) -> FileTeacher:
    norm = TinyImages().normalize
    return FileTeacher(path, norm.mean.flatten().tolist(), norm.std.flatten().tolist(), threads=1)


@pytest.mark.parametrize("name", ["model.onnx", "float.onnx", "model.xml"])
def test_a_file_says_of_normalized_images_what_its_network_says(
    folder: Path, network: torch.nn.Module, name: str
) -> None:
    image = TinyImages().normalize(next(iter(TinyImages().validation())).input)
    torch.testing.assert_close(teacher(folder / name)(image), network(image), rtol=1e-4, atol=1e-4)


def test_a_file_teaches_in_the_place_of_its_network(folder: Path, network: torch.nn.Module) -> None:
    data, model = TinyImages(), tiny_network()
    batch = next(iter(data.train()))
    batch = Batch(data.normalize(batch.input), batch.target)
    losses = []
    for its in (teacher(folder / "model.onnx"), network):
        method = Distill(its, [SoftTargets()])
        method.prepare(model, data)
        losses.append(method.step(batch, Forward(model, classify())).losses["soft_targets"])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_two_files_can_be_told_apart_by_what_is_in_them(folder: Path) -> None:
    one, other = (teacher(folder / name).state_dict()["digest"] for name in ("model.onnx", "float.onnx"))
    assert not torch.equal(one, other)


def test_a_file_has_no_layers_to_compare(folder: Path) -> None:
    with pytest.raises(UserError, match="the teacher has no stage -1; its stages are none"):
        Distill(teacher(folder / "model.onnx"), [Attention(layers=[-1])]).prepare(tiny_network(), TinyImages())


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"lost.onnx: no such file"):
        teacher(folder / "lost.onnx")


def test_a_file_for_other_normalization_cannot_teach(folder: Path) -> None:
    other = FileTeacher(folder / "model.onnx", [0.1] * 3, [0.2] * 3)
    with pytest.raises(UserError, match=r"the teacher was trained on images normalized with mean \[0.1, 0.1, 0.1\]"):
        Distill(other, [SoftTargets()]).prepare(tiny_network(), TinyImages())
