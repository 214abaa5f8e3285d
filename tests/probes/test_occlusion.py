from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, classify
from galago.probe import TEST, Deployed, collect
from galago.probes.occlusion import (
    OcclusionCurves,
    boundary_occluded,
    center_occluded,
    holes,
    mean_color,
    middle,
)
from galago.testing import check_probe
from noise import trained_network

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "reg_robustness_eval.npz")
DATA = TinyImages()


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


@pytest.mark.parametrize("side", [0, 1, 3, 6, 11, 12])
def test_hidden_images_are_the_golden_ones(side: int) -> None:
    zero = torch.zeros(3, 1, 1, dtype=torch.float64)
    assert torch.equal(center_occluded(golden("x"), (side, side), zero), golden(f"center_occlusion_{side}"))
    assert torch.equal(boundary_occluded(golden("x"), (side, side), zero), golden(f"boundary_occlusion_{side}"))


def test_the_middle_is_what_a_loop_finds_on_images_of_any_shape() -> None:
    for height, width in ((7, 12), (8, 8), (5, 4)):
        for hole in holes(height, width, 4):
            top, left = (height - hole[0]) // 2, (width - hole[1]) // 2
            for row in range(height):
                for column in range(width):
                    inside = top <= row < top + hole[0] and left <= column < left + hole[1]
                    assert middle(height, width, hole)[row, column].item() == inside


def test_the_color_is_0_after_normalization_up_to_half_a_level() -> None:
    color = mean_color(DATA)
    assert color.dtype == torch.uint8
    assert (DATA.normalize(color[None]).abs() <= 0.5 / 255 / DATA.normalize.std + 1e-6).all()


def test_errors_are_those_of_images_hidden_by_hand() -> None:
    deployed = Deployed(trained_network(60), DATA.normalize, classify()).eval()
    found = OcclusionCurves(steps=4)(deployed, classify(), DATA)
    images = torch.cat([batch.input for batch in DATA.test()])
    label = torch.cat([batch.target for batch in DATA.test()]).argmax(1)
    for side in (2, 4, 6):
        hidden = images.clone()
        start = (8 - side) // 2
        hidden[:, :, start : start + side, start : start + side] = 128
        wrong = (deployed(hidden).argmax(1) != label).double().mean().item()
        assert found[f"error_center_occluded_{side}"] == wrong
    assert list(found) == [
        *(f"error_center_occluded_{side}" for side in (0, 2, 4, 6, 8)),
        "mean_error_center_occluded",
        *(f"error_boundary_occluded_{side}" for side in (0, 2, 4, 6, 8)),
        "mean_error_boundary_occluded",
    ]
    curve = [found[f"error_boundary_occluded_{side}"] for side in (0, 2, 4, 6, 8)]
    assert found["mean_error_boundary_occluded"] == pytest.approx(sum(curve) / 5)


def test_the_ends_of_the_curves_are_the_clean_error_and_that_of_empty_images() -> None:
    deployed = Deployed(trained_network(60), DATA.normalize, classify()).eval()
    found = OcclusionCurves()(deployed, classify(), DATA)
    outputs = collect(deployed, DATA.test())
    label = outputs.target.argmax(1)
    clean = (outputs.output.argmax(1) != label).double().mean().item()
    assert found["error_center_occluded_0"] == found["error_boundary_occluded_8"] == clean
    empty = deployed(mean_color(DATA).expand(1, 3, 8, 8)).argmax(1)
    chance = (empty != label).double().mean().item()
    assert found["error_center_occluded_8"] == found["error_boundary_occluded_0"] == chance


def test_views_say_in_their_names_what_is_hidden() -> None:
    views = OcclusionCurves(steps=2).views(DATA)
    assert list(views) == [
        TEST,
        "occluded/center/4",
        "occluded/center/8",
        "occluded/boundary/0",
        "occluded/boundary/4",
    ]
    for name, view in views.items():
        assert len(view) == len(DATA.test())
        assert all(batch.input.dtype == torch.uint8 for batch in view), name


def test_images_that_are_not_square_have_holes_of_their_shape() -> None:
    class Wide(TinyImages):
        def _batches(self, epoch: int):
            return [one._replace(input=one.input[:, :, :6]) for one in super()._batches(epoch)]

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    found = OcclusionCurves(steps=2)(Deployed(Constant(), DATA.normalize, classify()), classify(), Wide())
    assert "error_center_occluded_3x4" in found
    assert "error_boundary_occluded_6x8" in found


def test_images_smaller_than_the_number_of_steps_have_fewer_sizes() -> None:
    assert holes(2, 2, 8) == [(0, 0), (1, 1), (2, 2)]


def test_it_obeys_the_laws_on_a_file_too() -> None:
    check_probe(lambda: OcclusionCurves(steps=2))


def test_no_steps_are_refused() -> None:
    with pytest.raises(UserError, match="steps is 0"):
        OcclusionCurves(steps=0)
