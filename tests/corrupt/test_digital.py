"""Contrast, colors, elastic maps, coarse pixels and JPEG against the reference and other libraries."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from galago.corrupt.corruption import truncated, unit
from galago.corrupt.digital import (
    Brightness,
    Contrast,
    ElasticTransform,
    JPEGCompression,
    Pixelate,
    Saturate,
    affine,
    brightness,
    contrast,
    displacement,
    pixelate,
    saturate,
    warp,
)
from photographs import agrees_with_statistics, batch, difference, figures, golden, photograph


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("kind", [Brightness, Contrast, Pixelate, JPEGCompression, Saturate])
def test_what_has_no_chance_is_the_reference_s(kind, size: int) -> None:
    arrays, clean = golden("deterministic", size), photograph("deterministic", size)
    for severity in range(1, 6):
        key, found = f"{kind.name}_s{severity}", kind()(clean, severity, [0])
        away = difference(found, arrays[key])
        assert away.max() <= 1, key
        assert (away > 0).double().mean() <= 0.06, key
        mean, std, psnr, _ = figures(found, clean)[0].tolist()
        assert [mean, std] == pytest.approx([float(arrays[f"{key}_{each}"]) for each in ("mean", "std")], abs=0.05)
        assert psnr == pytest.approx(float(arrays[f"{key}_psnr"]), abs=0.1)


@pytest.mark.parametrize(("size", "severity"), [(32, 1), (32, 3), (32, 5), (64, 2), (64, 4)])
def test_elastic_is_the_reference_s(size: int, severity: int) -> None:
    arrays, key = golden("seeded", size), f"elastic_transform_s{severity}"
    drawn = np.random.RandomState(int(arrays[f"{key}_seed"]))
    alpha, sigma, reach = (size * part for part in ElasticTransform.settings.at(size)[severity - 1])
    moved = affine(unit(photograph("seeded", size)), torch.from_numpy(drawn.uniform(-reach, reach, (1, 3, 2))))
    dx, dy = (displacement(torch.from_numpy(drawn.uniform(-1, 1, (1, size, size))), alpha, sigma) for _ in range(2))
    away = difference(truncated(warp(moved, dx, dy)), arrays[key])
    assert away.max() <= 2  # the reference rounds positions to 1/32 pixel
    assert away.double().mean() <= 0.25


@pytest.mark.parametrize(("size", "severity", "images"), [(32, 1, 40), (32, 5, 40), (64, 2, 20), (224, 2, 4)])
def test_own_elastic_draws_have_the_reference_s_statistics(size: int, severity: int, images: int) -> None:
    assert agrees_with_statistics(ElasticTransform(), size, severity, images)


def test_no_movement_is_no_change() -> None:
    x = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(affine(x, torch.zeros(2, 3, 2)), x)
    torch.testing.assert_close(warp(x, torch.zeros(2, 9, 12), torch.zeros(2, 9, 12)), x)


def test_points_moved_by_one_pixel_move_the_image_by_one_pixel() -> None:
    x = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    right = affine(x, torch.tensor([1.0, 0.0]).expand(1, 3, 2))
    torch.testing.assert_close(right[..., 1:], x[..., :-1])


def test_colors_equal_the_way_through_hsv() -> None:
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, 0, 0] = 0.4  # gray: its hue is that of red
    x[0, :, 0, 1] = 0
    stronger, brighter = saturate(x, 2, 0.1), brightness(x, 0.3)
    for i in range(4):
        for j in range(4):
            h, s, v = colorsys.rgb_to_hsv(*x[0, :, i, j].tolist())
            expected = colorsys.hsv_to_rgb(h, min(max(2 * s + 0.1, 0), 1), v)
            assert stronger[0, :, i, j].tolist() == pytest.approx(expected, abs=1e-9)
            expected = colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1))
            assert brighter[0, :, i, j].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [28, 33, 64])
@pytest.mark.parametrize("c", [0.95, 0.65, 0.25])
def test_pixels_are_averaged_as_pillow_does(size: int, c: float) -> None:
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    few = int(size * c)
    small = Image.fromarray(image).resize((few, few), Image.Resampling.BOX)
    expected = np.asarray(small.resize((size, size), Image.Resampling.BOX))
    away = difference(pixelate(batch(image), c), expected)
    assert away.max() <= 1
    assert (away > 0).double().mean() < 0.05


def test_contrast_keeps_each_channel_s_mean() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(contrast(x, 0.3).mean((2, 3)), x.mean((2, 3)))


def test_brightness_raises_the_mean_value() -> None:
    clean = photograph("deterministic", 32)
    assert Brightness()(clean, 3, [0]).amax(1).float().mean() > clean.amax(1).float().mean() + 10


def test_all_pixels_and_best_quality_change_next_to_nothing() -> None:
    clean = photograph("deterministic", 64)
    assert torch.equal(pixelate(clean, 1.0), clean)
    found = JPEGCompression().corrupt(clean, (100,), None)
    assert (found.float() - clean.float()).abs().mean() < 3  # colors are stored at half the size


@pytest.mark.parametrize("kind", [Contrast, JPEGCompression, Pixelate])
def test_harm_grows_with_severity(kind) -> None:
    clean = photograph("deterministic", 64)
    harm = [(kind()(clean, s, [0]).float() - clean.float()).abs().mean().item() for s in range(1, 6)]
    assert harm == sorted(harm)
