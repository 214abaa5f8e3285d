"""Snow, frost and fog against the reference; photographs of frost in all their ways to be wrong."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from galago.corrupt.corruption import truncated, unit
from galago.corrupt.primitives import motion, plasma
from galago.corrupt.weather import Fog, Frost, Snow, fog, frost, made_up_frost, snow, snow_layer
from galago.errors import UserError
from photographs import agrees_with_statistics, batch, difference, golden, photograph

SEEDED = [(32, 1), (32, 3), (32, 5), (64, 2), (64, 4)]


def legacy(name: str, size: int, severity: int) -> np.random.RandomState:
    return np.random.RandomState(int(golden("seeded", size)[f"{name}_s{severity}_seed"]))


@pytest.mark.parametrize(("size", "severity"), SEEDED)
def test_snow_is_the_reference_s(size: int, severity: int) -> None:
    m, sigma, z, t, r, b, k = Snow.settings.at(size)[severity - 1]
    drawn = legacy("snow", size, severity)
    layer = snow_layer(torch.from_numpy(drawn.normal(size=(1, size, size))).float(), m, sigma, z, t)
    theta = torch.tensor([math.radians(drawn.uniform(-135, -45))], dtype=torch.float64)
    found = truncated(snow(unit(photograph("seeded", size)), motion(layer, int(r), b, theta) / 255, k))
    assert difference(found, golden("seeded", size)[f"snow_s{severity}"]).max() <= 1


@pytest.mark.parametrize(("size", "severity"), SEEDED)
def test_fog_is_the_reference_s(size: int, severity: int) -> None:
    a, d = Fog.settings.at(size)[severity - 1]
    u = torch.from_numpy(legacy("fog", size, severity).uniform(-1, 1, (1, size * size - 1)))
    found = truncated(fog(unit(photograph("seeded", size)), plasma(u, size, d).float(), a))
    assert difference(found, golden("seeded", size)[f"fog_s{severity}"]).max() <= 1


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_frost_blends_as_the_reference_does(size: int, severity: int) -> None:
    arrays = golden("seeded", size)
    row, column = int(arrays["frost_row"]), int(arrays["frost_col"])
    ice = batch(arrays["frost_texture"])[..., row : row + size, column : column + size]
    a, b = Frost.settings.at(size)[severity - 1]
    found = frost(photograph("seeded", size).float(), ice.float(), a, b)
    assert difference(found, arrays[f"frost_s{severity}"]).max() <= 1


@pytest.mark.parametrize(("size", "severity", "images"), [(32, 1, 40), (32, 5, 40), (64, 3, 20), (224, 4, 4)])
@pytest.mark.parametrize("kind", [Snow, Fog])
def test_own_draws_have_the_reference_s_statistics(kind, size: int, severity: int, images: int) -> None:
    assert agrees_with_statistics(kind(), size, severity, images)


def test_fog_keeps_the_brightest_value() -> None:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert fog(x, torch.ones(1, 16, 16), 2.0).max().item() == pytest.approx(x.max().item())


def test_five_textures_are_made_up_and_differ() -> None:
    textures = made_up_frost(64)
    assert len(textures) == 5
    assert 140 < torch.stack(textures).mean() < 175  # the published photographs: near 155
    for one in textures:
        assert one.shape == (3, 64, 64)
        assert 0 <= one.min() < one.max() <= 255
    assert not torch.equal(textures[0], textures[1])


def test_frost_says_whether_it_was_made_up(tmp_path: Path) -> None:
    assert Frost().name == "frost_synthetic"
    assert Frost().identity() == "frost_synthetic"
    assert Frost(tmp_path).name == "frost"
    assert Frost(tmp_path).identity() != Frost(tmp_path / "other").identity()


def plain(height: int, width: int, level: int) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), level, dtype=np.uint8))


def test_photographs_are_used_the_first_five_and_scaled(tmp_path: Path) -> None:
    for number in range(6):
        plain(200, 240, 40 * number).save(tmp_path / f"frost{number}.png")
    black = torch.zeros(60, 3, 32, 32, dtype=torch.uint8)
    found = Frost(tmp_path)(black, 1, range(60))
    assert found.unique().tolist() == [0, 8, 16, 24, 32]  # 0.2 · 40 · {0 … 4}: the sixth is never used
    assert Frost(tmp_path).textures(black.shape[-2:])[0].shape == (3, 40, 48)


def test_photographs_that_do_not_do_are_refused(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match="has 0 JPEG or PNG images; 5 of frost are needed"):
        Frost(tmp_path)(image, 1, [0])
    small, broken = tmp_path / "small", tmp_path / "broken"
    for folder in (small, broken):
        folder.mkdir()
        for number in range(5):
            plain(100, 100, 0).save(folder / f"{number}.png")
    with pytest.raises(UserError, match="20×20 when scaled, less than the images' 32×32"):
        Frost(small).require(image)
    (broken / "3.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read .*3\.png"):
        Frost(broken)(image, 1, [0])
