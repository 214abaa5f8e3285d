"""Boxes from class-activation maps: each step against a loop, and the whole against a network that cannot miss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from galago.batch import Batch
from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.probe import Deployed
from galago.probes.localization import (
    Localization,
    activation_map,
    largest_part,
    overlap,
    tight_box,
)
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.testing import check_probe

FIELD = [1, 5, 2, 7]  # where the object is in each of the images below


class WithField(TinyImages):
    """The laws' images: a class is a channel, which is bright in one rectangle and dark elsewhere."""

    box: Tensor = torch.tensor(FIELD).float()

    def _batches(self, epoch: int) -> list[Batch]:
        found = []
        for batch in super()._batches(epoch):
            image = torch.zeros_like(batch.input)
            top, bottom, left, right = FIELD
            image[:, :, top:bottom, left:right] = (250 * batch.target).to(torch.uint8)[:, :, None, None]
            boxes = self.box.expand(len(image), *self.box.shape)
            found.append(batch._replace(input=image, extra=batch.extra | {"box": boxes}))
        return found


class Channels(nn.Module):
    """Whose last map is the image itself, and whose classifier asks for one channel a class."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.last, self.pool, self.flatten = nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.flatten(self.pool(self.last(x))))
        return scores


def measured(network: nn.Module, data: TinyImages, probe: Localization) -> dict[str, float]:
    return probe(Deployed(network, data.normalize, classify()).eval(), classify(), data)


def test_the_map_is_the_weighted_sum_of_the_class_from_0_to_1() -> None:
    features, weight, label = torch.randn(4, 5, 3, 6), torch.randn(7, 5), torch.tensor([0, 6, 3, 3])
    found = activation_map(features, weight, label)
    for number in range(4):
        raw = sum(weight[label[number], channel] * features[number, channel] for channel in range(5))
        torch.testing.assert_close(found[number], (raw - raw.min()) / (raw.max() - raw.min()))


def test_a_flat_map_has_no_box() -> None:
    found = activation_map(torch.ones(1, 2, 3, 3), torch.ones(2, 2), torch.tensor([0]))
    assert (found == 0).all()
    assert tight_box(largest_part((found[0] >= 0.2).numpy())) == [0, 0, 0, 0]


def test_the_largest_part_is_the_one_that_scipy_finds() -> None:
    draw = np.random.default_rng(0)
    for height, width in ((1, 1), (6, 9), (20, 20)):
        for share in (0.0, 0.3, 0.5, 0.7, 1.0):
            inside = draw.random((height, width)) < share
            labels, _ = ndimage.label(inside)
            sizes = np.bincount(labels.ravel())[1:]
            expected = labels == sizes.argmax() + 1 if len(sizes) else np.zeros_like(inside)
            assert np.array_equal(largest_part(inside), expected)


def test_a_box_holds_all_of_the_part_and_nothing_beside_it() -> None:
    draw = np.random.default_rng(1)
    for _ in range(20):
        inside = draw.random((7, 9)) < 0.1
        top, bottom, left, right = tight_box(inside)
        assert inside.sum() == inside[top:bottom, left:right].sum()
        if inside.any():
            assert inside[top].any()
            assert inside[bottom - 1].any()
            assert inside[:, left].any()
            assert inside[:, right - 1].any()


def test_overlap_is_what_counting_pixels_gives() -> None:
    corners = torch.randint(0, 9, (50, 2, 4)).sort(2).values[:, :, [0, 2, 1, 3]]
    first, second = corners.unbind(1)
    found = overlap(first.float(), second.float())
    for one, other, share in zip(first.tolist(), second.tolist(), found.tolist(), strict=True):
        masks = np.zeros((2, 9, 9), dtype=bool)
        for mask, (top, bottom, left, right) in zip(masks, (one, other), strict=True):
            mask[top:bottom, left:right] = True
        union = (masks[0] | masks[1]).sum()
        assert share == pytest.approx((masks[0] & masks[1]).sum() / union if union else 0.0)


def test_a_network_that_looks_at_the_object_finds_it() -> None:
    found = measured(Channels(torch.eye(3)), WithField(), Localization())
    assert found["localization_accuracy"] == found["box_accuracy"] == found["box_overlap"] == 1
    assert found["whole_image_box_accuracy"] == 0  # 20 of 64 pixels


def test_a_wrong_class_is_no_localization_even_with_the_right_box() -> None:
    found = measured(Channels(torch.eye(3)[[1, 2, 0]]), WithField(), Localization())
    assert found["localization_accuracy"] == 0
    assert found["box_accuracy"] == 1


def test_a_network_that_looks_elsewhere_does_not_find_it() -> None:
    class Elsewhere(WithField):
        box = torch.tensor([5, 8, 0, 3]).float()

    found = measured(Channels(torch.eye(3)), Elsewhere(), Localization())
    assert found["box_overlap"] == found["localization_accuracy"] == 0


def test_the_best_of_several_true_boxes_counts_and_empty_ones_never() -> None:
    class Several(WithField):
        box = torch.tensor([[5, 8, 0, 3], FIELD, [0, 0, 0, 0]]).float()

    assert measured(Channels(torch.eye(3)), Several(), Localization())["localization_accuracy"] == 1


def test_a_layer_may_be_named_and_must_fit_the_classifier() -> None:
    probe = Localization(layer="last")
    assert measured(Channels(torch.eye(3)), WithField(), probe)["localization_accuracy"] == 1
    with pytest.raises(UserError, match="layer 'stem' gives no map of 10 channels"):
        measured(tiny_network(), WithField(), Localization(layer="stem"))
    with pytest.raises(UserError, match="no layer 'lost'"):
        measured(tiny_network(), WithField(), Localization(layer="lost"))
    with pytest.raises(UserError, match="no layer gives a map of 192 channels"):
        measured(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), WithField(), Localization())


def test_data_without_boxes_are_refused() -> None:
    with pytest.raises(UserError, match=r"the data know no boxes; wrap them in galago\.datasets\.boxed"):
        measured(tiny_network(), TinyImages(), Localization())


def test_a_quantized_network_is_measured_and_a_file_is_not(tmp_path: Path) -> None:
    data = WithField()
    quantized = Quantize(LSQWeight(4), LSQ(4)).prepare(tiny_network(), data).eval()
    assert measured(quantized, data, Localization()).keys() == {
        "localization_accuracy",
        "box_accuracy",
        "box_overlap",
        "whole_image_box_accuracy",
    }
    deployed = Deployed(tiny_network(), data.normalize, classify()).eval()
    export(deployed, data.example(), tmp_path / "model.onnx")
    assert Localization()(OnnxRuntime(tmp_path / "model.onnx"), classify(), data) == {}


def test_it_obeys_the_laws() -> None:
    check_probe(Localization, make_data=WithField, same_on_artifact=False)


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"threshold": 1.5}, {"least_overlap": 0.0}])
def test_shares_that_mean_nothing_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"Localization: {next(iter(wrong))} is"):
        Localization(**wrong)
