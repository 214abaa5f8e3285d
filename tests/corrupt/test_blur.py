"""Blurs against the reference, and glass against its own loop over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from galago.corrupt.blur import (
    DefocusBlur,
    GaussianBlur,
    GlassBlur,
    MotionBlur,
    ZoomBlur,
    blurred,
    disk,
    glass,
    without_zeros,
)
from galago.corrupt.primitives import motion
from photographs import agrees_with_statistics, difference, figures, golden, photograph

SEEDED = [(32, 1), (32, 3), (32, 5), (64, 2), (64, 4)]


def legacy(name: str, size: int, severity: int) -> np.random.RandomState:
    return np.random.RandomState(int(golden("seeded", size)[f"{name}_s{severity}_seed"]))


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("kind", [DefocusBlur, ZoomBlur, GaussianBlur])
def test_blur_without_chance_is_the_reference_s(kind, size: int) -> None:
    arrays, clean = golden("deterministic", size), photograph("deterministic", size)
    for severity in range(1, 6):
        key, found = f"{kind.name}_s{severity}", kind()(clean, severity, [0])
        away = difference(found, arrays[key])
        assert away.max() <= 1, key
        assert (away > 0).double().mean() <= 0.06, key
        mean, std, psnr, _ = figures(found, clean)[0].tolist()
        assert [mean, std] == pytest.approx([float(arrays[f"{key}_{each}"]) for each in ("mean", "std")], abs=0.05)
        assert psnr == pytest.approx(float(arrays[f"{key}_psnr"]), abs=0.1)


@pytest.mark.parametrize(("size", "severity"), SEEDED)
def test_glass_is_the_reference_s(size: int, severity: int) -> None:
    sigma, delta, passes = GlassBlur.settings.at(size)[severity - 1]
    drawn, reach = legacy("glass_blur", size, severity), int(delta)
    found = blurred(photograph("seeded", size), sigma)
    for _ in range(int(passes)):
        d = torch.from_numpy(drawn.randint(-reach, reach, (1, size - 2 * reach, size - 2 * reach, 2)))
        found = glass(found, d[..., 0], d[..., 1], reach)
    found = blurred(found, sigma)
    assert difference(found, golden("seeded", size)[f"glass_blur_s{severity}"]).max() <= 1


@pytest.mark.parametrize("delta", [1, 2, 4])
def test_following_chains_gives_what_a_loop_over_pixels_gives(delta: int) -> None:
    generator = torch.Generator().manual_seed(delta)
    images = torch.randint(0, 256, (3, 3, 14, 17), generator=generator).byte()
    dx, dy = torch.randint(-delta, delta, (2, 3, 14 - 2 * delta, 17 - 2 * delta), generator=generator)
    assert torch.equal(glass(images, dx, dy, delta), looped(images, dx, dy, delta))


def looped(images: Tensor, dx: Tensor, dy: Tensor, delta: int) -> Tensor:
    found = images.clone()
    height, width = images.shape[-2:]
    for n in range(len(images)):
        for i, h in enumerate(range(height - delta, delta, -1)):
            for j, w in enumerate(range(width - delta, delta, -1)):
                found[n, :, h, w] = found[n, :, h + int(dy[n, i, j]), w + int(dx[n, i, j])]
    return found


@pytest.mark.parametrize(("size", "severity"), SEEDED)
def test_motion_is_the_reference_s(size: int, severity: int) -> None:
    radius, sigma = MotionBlur.settings.at(size)[severity - 1]
    theta = math.radians(legacy("motion_blur", size, severity).uniform(-45, 45))
    found = motion(photograph("seeded", size).float(), int(radius), sigma, torch.tensor([theta], dtype=torch.float64))
    away = difference(found, golden("seeded", size)[f"motion_blur_s{severity}"])
    assert away.max() <= 1
    assert (away > 0).double().mean() <= 0.01


@pytest.mark.parametrize(("size", "severity", "images"), [(32, 1, 40), (32, 5, 40), (64, 4, 20), (224, 3, 4)])
@pytest.mark.parametrize("kind", [GlassBlur, MotionBlur])
def test_own_draws_have_the_reference_s_statistics(kind, size: int, severity: int, images: int) -> None:
    assert agrees_with_statistics(kind(), size, severity, images)


@pytest.mark.parametrize(("r", "a", "side"), [(0.3, 0.4, 3), (3, 0.1, 7), (8, 0.5, 17), (10, 0.5, 21)])
def test_a_disk_adds_up_to_one_and_is_no_larger_than_needed(r: float, a: float, side: int) -> None:
    assert disk(r, a).sum().item() == pytest.approx(1, abs=0.02)
    assert without_zeros(disk(r, a)).shape == (side, side)


def test_harm_of_blur_grows_with_severity() -> None:
    clean = photograph("deterministic", 64)
    for kind in (DefocusBlur, ZoomBlur, GaussianBlur):
        harm = [(kind()(clean, s, [0]).float() - clean.float()).abs().mean().item() for s in range(1, 6)]
        assert harm == sorted(harm), kind
