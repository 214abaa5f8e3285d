"""ODIN against the official numbers and loops; what it tells of noise, of quantized networks and of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galago.deploy.integer import lower
from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify
from galago.outside import OtherData
from galago.outside_made_up import Uniform
from galago.probe import Deployed
from galago.probes.odin import ODIN, odin
from galago.probes.out_of_distribution import OutOfDistribution, maximum_softmax
from galago.probes.stepping import stepped
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.tasks.abstain import ClassifyOrAbstain
from galago.testing import check_probe
from noise import trained_network
from outsiders import Pictures, golden, golden_network, noise, two_sets

DATA = TinyImages()
TEMPERATURE, EPSILON = float(golden("odin_temperature")), float(golden("odin_epsilon"))


def deployed(network: nn.Module) -> Deployed:
    return Deployed(network, DATA.normalize, classify()).eval()


def test_scores_are_those_of_the_official_code() -> None:
    found = odin(golden_network(), golden("x"), TEMPERATURE, EPSILON)
    torch.testing.assert_close(found, golden("score_odin"), rtol=0, atol=1e-9)


def test_the_step_goes_against_the_golden_gradient_and_a_zero_counts_as_positive() -> None:
    network, x = golden_network(), golden("x")
    said = network(x).argmax(1)

    def loss(seen: Tensor) -> Tensor:
        return nn.functional.cross_entropy(network(seen) / TEMPERATURE, said, reduction="none")

    sign = torch.where(golden("odin_input_gradient") >= 0, 1.0, -1.0)
    torch.testing.assert_close(stepped(x, loss, EPSILON), x - EPSILON * sign, rtol=0, atol=1e-12)
    flat = stepped(x, lambda seen: 0 * seen.flatten(1).sum(1), 0.25)
    torch.testing.assert_close(flat, x - 0.25)
    assert stepped(x, loss, 0.0) is x


def test_each_image_is_stepped_on_its_own() -> None:
    network, x = golden_network(), golden("x")
    alone = torch.cat([odin(network, one[None], TEMPERATURE, EPSILON) for one in x])
    torch.testing.assert_close(odin(network, x, TEMPERATURE, EPSILON), alone, rtol=0, atol=1e-12)


def test_without_a_step_at_temperature_1_it_is_the_largest_probability() -> None:
    network, x = golden_network(), golden("x")
    torch.testing.assert_close(odin(network, x, 1.0, 0.0), maximum_softmax(network(x)), rtol=0, atol=1e-12)
    own = OutOfDistribution(two_sets())(deployed(trained_network(60)), classify(), DATA)
    found = ODIN(two_sets(), temperature=1.0, epsilon=0.0)(deployed(trained_network(60)), classify(), DATA)
    # of twenty images in batches of eight, eight and four, an even spread is all
    assert found["auroc_odin_uniform"] == pytest.approx(own["auroc_msp_uniform"], abs=1e-3)


def test_the_step_makes_every_image_surer() -> None:
    network, x = golden_network(), golden("x")
    assert (odin(network, x, 1.0, 1e-3) > odin(network, x, 1.0, 0.0)).all()


def test_pixels_are_stepped_on_before_normalization_and_not_cut() -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x.mean((2, 3))

    black = Pictures(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    ODIN([OtherData("white", Pictures(torch.full((5, 3, 8, 8), 255, dtype=torch.uint8)))], epsilon=0.5)(
        Deployed(Watching(), black.normalize, classify()), classify(), black
    )
    pixels = (
        torch.stack([image.min() for image in seen]) * 0.25 + 0.5,
        torch.stack([i.max() for i in seen]) * 0.25 + 0.5,
    )
    assert float(pixels[0].min()) == pytest.approx(-0.5)
    assert float(pixels[1].max()) == pytest.approx(1.5)


def test_a_high_temperature_loses_no_digits_in_a_float32_network() -> None:
    network, x = golden_network().float(), golden("x").float()
    found = odin(network, x, TEMPERATURE, EPSILON)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, golden("score_odin"), rtol=0, atol=1e-8)


def test_dicts_of_outputs_and_tasks_that_abstain_are_scored_by_their_classes() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = trained_network(60)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"main": self.network(x), "auxiliary": torch.zeros(len(x), 7)}

    one, other = (ODIN(two_sets())(deployed(n), classify(), DATA) for n in (Several(), trained_network(60)))
    assert one == other
    task = ClassifyOrAbstain(2, 1.5)
    assert ODIN(two_sets())(Deployed(trained_network(), DATA.normalize, task), task, DATA).keys() == one.keys()


def test_a_quantized_network_is_told_of_and_files_and_integer_modules_are_not(tmp_path: Path) -> None:
    network = Quantize(LSQWeight(4), LSQ(4)).prepare(trained_network(60), DATA).eval()
    assert "auroc_odin_uniform" in ODIN(two_sets())(deployed(network), classify(), DATA)
    integer = lower(network, DATA.normalize(DATA.example()))
    assert ODIN(two_sets())(deployed(integer), classify(), DATA) == {}
    export(deployed(trained_network(5)), DATA.example(), tmp_path / "model.onnx")
    assert ODIN(two_sets())(OnnxRuntime(tmp_path / "model.onnx"), classify(), DATA) == {}


def test_it_obeys_the_laws() -> None:
    check_probe(lambda: ODIN(two_sets(), images=16), trained_network, same_on_artifact=False)


def test_a_diverged_network_is_refused_by_name() -> None:
    network = trained_network()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="odin: the network's answers to 48 of 48 images of the test set"):
        ODIN(two_sets())(deployed(network), classify(), DATA)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"epsilon": -0.1}, {"images": 0}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"ODIN: temperature .* must be above 0, epsilon"):
        ODIN([Uniform()], **wrong)


def test_images_of_any_size_can_be_outside() -> None:
    found = ODIN([OtherData("other", Pictures(noise(7, 1, 20, 13)))])(deployed(trained_network()), classify(), DATA)
    assert 0 <= found["auroc_odin_other"] <= 1
