"""Bytes of files and of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from galago.errors import UserError
from galago.models.tiny import tiny
from galago.probe import Deployed
from galago.probes.size import Size, bytes_as_safetensors, bytes_on_disk
from galago.tasks.classify import Classify
from galago.testing import check_probe


class File(nn.Module):
    """Stands for a file in an engine."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path


def test_an_openvino_file_counts_with_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_bytes(bytes(1_000))
    (tmp_path / "model.bin").write_bytes(bytes(2_500_000))
    numbers = Size()(File(tmp_path / "model.xml"), Classify(10), None)  # type: ignore[arg-type]
    assert numbers == {"file_mb": 2.501}


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx_data"])
def test_an_onnx_file_counts_with_its_external_data(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(bytes(10))
    (tmp_path / name).write_bytes(bytes(90))
    (tmp_path / "other.onnx").write_bytes(bytes(1000))
    assert bytes_on_disk(tmp_path / "model.onnx") == 100


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.xml").touch()
    with pytest.raises(UserError, match=r"model\.bin does not exist"):
        bytes_on_disk(tmp_path / "model.xml")


def test_a_network_has_the_size_of_its_safetensors_file(tmp_path: Path) -> None:
    network = tiny()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert bytes_as_safetensors(network) == on_disk
    assert Size()(Deployed(network, nn.Identity(), Classify(10)), Classify(10), None) == {"file_mb": on_disk / 1e6}  # type: ignore[arg-type]


def test_half_precision_is_half_the_size() -> None:
    single, half = bytes_as_safetensors(nn.Linear(1000, 100)), bytes_as_safetensors(nn.Linear(1000, 100).bfloat16())
    assert single / half == pytest.approx(2, abs=0.01)


def test_a_transposed_weight_can_be_measured() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.zeros(3, 2).T
    assert bytes_as_safetensors(layer) == bytes_as_safetensors(nn.Linear(3, 2))


def test_the_laws_of_probes_hold() -> None:
    check_probe(Size, same_on_artifact=False)
