"""MobileNetV2 for small images."""

from __future__ import annotations

import pytest
import torch
import torchvision

from galago.errors import UserError
from galago.models.mobilenet import MobileNetV2, divisible, mobilenet_v2
from galago.spec import build, describe


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4])
def test_parameters_equal_those_of_torchvision(width: float) -> None:
    with torch.device("meta"):
        ours = sum(p.numel() for p in mobilenet_v2(classes=10, width=width).parameters())
        theirs = torchvision.models.mobilenet_v2(num_classes=10, width_mult=width)
    assert ours == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(("pixels", "left"), [(32, 4), (64, 8)])
def test_small_images_keep_a_feature_map(pixels: int, left: int) -> None:
    network = MobileNetV2(width=0.25).eval()
    assert network.blocks(network.stem(torch.zeros(1, 3, pixels, pixels))).shape[2:] == (left, left)


def test_classes_and_channels_are_free() -> None:
    assert mobilenet_v2(classes=7, channels=1, width=0.25)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_rounding_never_loses_more_than_a_tenth() -> None:
    assert all(divisible(c) % 8 == 0 and divisible(c) >= 0.9 * c for c in range(1, 700))


def test_a_network_can_be_written_down_and_rebuilt() -> None:
    network = MobileNetV2(classes=4, channels=1, width=0.25)
    twin = build(describe(network))
    assert [p.shape for p in twin.parameters()] == [p.shape for p in network.parameters()]


def test_no_width_is_refused_with_advice() -> None:
    with pytest.raises(UserError, match="width is 0"):
        mobilenet_v2(width=0)
