"""Norms of a network's layers, with BatchNorm and rounding in them, against the layers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.probe import Deployed, Probe
from galago.probes.operator_norm import LayerNorms, OperatorNorms
from galago.quantize.lsq import LSQWeight
from galago.testing import check_probe
from samples import quantized_tiny_network


def deployed(model: nn.Module) -> Deployed:
    return Deployed(model, TinyImages().normalize, classify()).eval()


def table(model: nn.Module, steps: int = 300) -> dict[str, LayerNorms]:
    return {row.path: row for row in OperatorNorms(steps).table(deployed(model), TinyImages())}


def matrix(part: nn.Module, *size: int) -> Tensor:
    """What a linear function without its constant makes of every basis vector, outputs×inputs."""
    basis = torch.eye(int(torch.tensor(size).prod())).view(-1, *size)
    with torch.no_grad():
        return (part(basis) - part(torch.zeros_like(basis))).flatten(1).T


def unsettled(model: nn.Module) -> nn.Module:
    """BatchNorms that do something."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            part.running_var.uniform_(0.5, 2)
            part.running_mean.normal_()
    return model.eval()


def agrees(row: LayerNorms, dense: Tensor) -> None:
    assert row.l1 == pytest.approx(float(dense.abs().sum(0).max()), rel=1e-4)
    assert row.linf == pytest.approx(float(dense.abs().sum(1).max()), rel=1e-4)
    assert row.spectral == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-2)
    assert row.spectral <= float(torch.linalg.matrix_norm(dense, 2)) * (1 + 1e-5)


def test_a_layers_norms_are_those_of_it_and_its_batch_norm_together() -> None:
    model = unsettled(tiny_network())
    found = table(model)
    assert list(found) == ["stem.0", "block.first.0", "block.conv", "down.0", "head"]
    agrees(found["stem.0"], matrix(nn.Sequential(model.stem[0], model.stem[1]), 3, 8, 8))
    agrees(found["down.0"], matrix(nn.Sequential(model.down[0], model.down[1]), 5, 8, 8))
    agrees(found["head"], matrix(model.head, 10))
    assert (found["down.0"].batch_norm, found["head"].batch_norm) == ("down.1", None)


def test_transposed_and_grouped_convolutions_are_measured_with_their_batch_norm() -> None:
    up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    model = unsettled(nn.Sequential(nn.Conv2d(3, 4, 1), up, nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2)))
    found = table(model)
    agrees(found["1"], matrix(model[1:3], 4, 8, 8))
    agrees(found["3"], matrix(model[3], 6, 16, 16))


def test_quantized_layers_are_measured_with_the_weight_that_they_compute_with() -> None:
    model = unsettled(quantized_tiny_network(LSQWeight(2)))
    rounded = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    rounded.weight = nn.Parameter(model.stem[0].parameters_used()["weight"].detach())
    row = table(model)["stem.0"]
    assert (row.type, row.batch_norm) == ("Conv2d", "stem.1")
    agrees(row, matrix(nn.Sequential(rounded, model.stem[1]), 3, 8, 8))
    assert not torch.allclose(rounded.weight, model.stem[0].layer.weight, rtol=0.1)


def test_numbers_are_the_largest_and_the_geometric_mean_and_zero_for_dead_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        for layer, value in ((model[0], 2.0), (model[2], 8.0)):
            layer.weight.fill_(value)
    numbers = OperatorNorms()(deployed(model), classify(), TinyImages())
    assert numbers["l1_norm_max"] == pytest.approx(16.0)
    assert numbers["l1_norm_mean"] == pytest.approx(8.0)
    assert numbers["linf_norm_max"] == pytest.approx(16.0)
    assert numbers["spectral_norm_max"] == pytest.approx(16.0, rel=1e-4)
    with torch.no_grad():
        model[2].weight.zero_()
    numbers = OperatorNorms(steps=0)(deployed(model), classify(), TinyImages())
    assert numbers["l1_norm_mean"] == 0.0
    assert "spectral_norm_max" not in numbers


def test_a_file_and_a_network_without_layers_have_no_norms(tmp_path) -> None:
    network, data = deployed(tiny_network()), TinyImages()
    file = OnnxRuntime(export(network, data.example(), tmp_path / "model.onnx"))
    assert OperatorNorms()(file, classify(), data) == {}
    assert OperatorNorms()(deployed(nn.Flatten()), classify(), data) == {}


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(UserError, match="steps is -1"):
        OperatorNorms(steps=-1)


@pytest.mark.parametrize("make_model", [tiny_network, quantized_tiny_network])
def test_the_laws_of_probes_hold(make_model) -> None:
    def probe() -> Probe:
        return OperatorNorms(steps=5)

    check_probe(probe, make_model=make_model, same_on_artifact=False)
