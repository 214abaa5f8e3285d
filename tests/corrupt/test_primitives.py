"""Blurs, magnification, motion and clouds against the reference and against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from galago.corrupt.primitives import blur, correlate, motion, motion_weights, plasma, reflected, zoom
from photographs import difference, golden, photograph


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("degrees", ["-110", "-37", "0", "12.5", "45"])
def test_motion_at_fixed_angles_is_the_reference_s(size: int, degrees: str) -> None:
    arrays = golden("seeded", size)
    radius, sigma = int(arrays["motion_radius"]), float(arrays["motion_sigma"])
    angle = torch.tensor([math.radians(float(degrees))], dtype=torch.float64)
    away = difference(
        motion(photograph("seeded", size).float(), radius, sigma, angle), arrays[f"motion_angle_{degrees}"]
    )
    assert away.max() <= 1
    assert (away > 0).double().mean() <= 0.01


def test_motion_is_the_sum_of_shifted_images() -> None:
    image, (radius, sigma, theta) = (random(1, 1, 9, 11) * 255).float(), (3, 2.0, 0.7)
    expected = torch.zeros(9, 11)
    for i, weight in enumerate(motion_weights(radius, sigma)):
        dy, dx = (-math.ceil(i * part - 0.5) for part in (math.sin(theta), math.cos(theta)))
        for y in range(9):
            for x in range(11):
                expected[y, x] += weight * image[0, 0, min(max(y - dy, 0), 8), min(max(x - dx, 0), 10)]
    found = motion(image, radius, sigma, torch.tensor([theta]))[0, 0]
    assert (found - expected.floor()).abs().max() <= 1
    assert (found != expected.floor()).sum() <= 1


def test_motion_leaves_a_plain_image_as_it_is() -> None:
    assert torch.equal(
        motion(torch.full((1, 3, 32, 32), 200.0), 10, 5.0, torch.tensor([0.4])).unique(), torch.tensor([200.0])
    )


@pytest.mark.parametrize("decay", ["3", "2", "1.75"])
def test_plasma_is_the_reference_s(decay: str) -> None:
    arrays = golden("seeded", 32)
    seed = int(arrays[f"plasma16_decay_{decay}_seed"])
    u = torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, (1, 255)))
    np.testing.assert_allclose(plasma(u, 16, float(decay))[0], arrays[f"plasma16_decay_{decay}"], atol=1e-9)


@pytest.mark.parametrize("kernel", [3, 7, 9, 15])
def test_correlation_is_the_same_by_sums_and_through_fourier_space(kernel: int) -> None:
    x, weights, reach = random(2, 3, 20, 24), random(kernel, kernel), kernel // 2
    padded = torch.nn.functional.pad(x, (reach,) * 4, mode="reflect")
    expected = torch.nn.functional.conv2d(padded.view(6, 1, *padded.shape[2:]), weights[None, None]).view(x.shape)
    torch.testing.assert_close(correlate(x, weights), expected)


def test_blur_equals_a_loop_over_weights() -> None:
    x, sigma = random(1, 1, 6, 9), 1.3
    weight = [math.exp(-i * i / (2 * sigma**2)) for i in range(-5, 6)]
    row = torch.zeros(6, 9, dtype=torch.float64)
    for column in range(9):
        for i, w in zip(range(-5, 6), weight, strict=True):
            row[:, column] += w / sum(weight) * x[0, 0, :, min(max(column + i, 0), 8)]
    expected = torch.zeros_like(row)
    for line in range(6):
        for i, w in zip(range(-5, 6), weight, strict=True):
            expected[line] += w / sum(weight) * row[min(max(line + i, 0), 5)]
    torch.testing.assert_close(blur(x, sigma)[0, 0], expected)


def test_a_blur_wider_than_the_image_reflects_it_again_and_again() -> None:
    wide = torch.cat([random(4), random(4).flip(0)] * 10)
    assert torch.equal(wide, wide[reflected(torch.arange(80), 8)])
    found = blur(random(1, 4, 4), 9.0, truncate=3.0, border=reflected)
    torch.testing.assert_close(found, random(1, 4, 4).mean().expand(1, 4, 4), rtol=0, atol=0.02)


def test_blur_by_almost_nothing_is_nothing() -> None:
    x = random(1, 5, 5)
    assert blur(x, 0.1) is x


def test_zoom_by_one_is_the_image_and_by_two_its_middle() -> None:
    x = random(1, 1, 8, 8)
    torch.testing.assert_close(zoom(x, 1.0), x)
    assert zoom(x, 2.0)[0, 0, 0, 0] == x[0, 0, 2, 2]
    assert zoom(x, 2.0)[0, 0, 7, 7] == x[0, 0, 5, 5]
