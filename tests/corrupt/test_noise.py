"""Noise against the reference's seeded images and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galago.corrupt.corruption import truncated, unit
from galago.corrupt.noise import (
    GaussianNoise,
    ImpulseNoise,
    ShotNoise,
    SpeckleNoise,
    gaussian_noise,
    impulse_noise,
    shot_noise,
    speckle_noise,
)
from photographs import agrees_with_statistics, batch, difference, golden, photograph

SEEDED = [(32, 1), (32, 3), (32, 5), (64, 2), (64, 4)]
cases = pytest.mark.parametrize(("size", "severity"), SEEDED)


def legacy(name: str, size: int, severity: int) -> np.random.RandomState:
    return np.random.RandomState(int(golden("seeded", size)[f"{name}_s{severity}_seed"]))


@cases
@pytest.mark.parametrize(("kind", "formula"), [(GaussianNoise, gaussian_noise), (SpeckleNoise, speckle_noise)])
def test_normal_noise_is_the_reference_s(kind, formula, size: int, severity: int) -> None:
    (c,) = kind.settings.at(size)[severity - 1]
    n = batch(legacy(kind.name, size, severity).normal(size=(size, size, 3)))
    found = truncated(formula(unit(photograph("seeded", size)), n, c))
    assert difference(found, golden("seeded", size)[f"{kind.name}_s{severity}"]).max() <= 1


@cases
def test_shot_noise_is_the_reference_s(size: int, severity: int) -> None:
    (c,) = ShotNoise.settings.at(size)[severity - 1]
    rates = golden("seeded", size)["image"] / 255 * c
    counts = batch(legacy("shot_noise", size, severity).poisson(rates)).double()
    away = difference(truncated(shot_noise(counts, c)), golden("seeded", size)[f"shot_noise_s{severity}"])
    assert away.max() <= 1


@cases
def test_impulse_noise_is_the_reference_s(size: int, severity: int) -> None:
    arrays, (c,) = golden("seeded", size), ImpulseNoise.settings.at(size)[severity - 1]
    generator = np.random.default_rng(int(arrays[f"impulse_noise_s{severity}_seed"]))
    u, v = (batch(generator.random((size, size, 3))) for _ in range(2))
    found = truncated(impulse_noise(unit(photograph("seeded", size)), u, v, c))
    assert difference(found, arrays[f"impulse_noise_s{severity}"]).max() <= 1


@pytest.mark.parametrize(("size", "severity", "images"), [(32, 1, 40), (32, 5, 40), (64, 3, 20), (224, 5, 3)])
@pytest.mark.parametrize("kind", [GaussianNoise, ShotNoise, ImpulseNoise, SpeckleNoise])
def test_own_draws_have_the_reference_s_statistics(kind, size: int, severity: int, images: int) -> None:
    assert agrees_with_statistics(kind(), size, severity, images)


def test_shot_noise_keeps_the_mean() -> None:
    gray = torch.full((50, 3, 32, 32), 100, dtype=torch.uint8)
    found = ShotNoise()(gray, 1, range(50)).float().mean().item()
    assert found == pytest.approx(100 - 0.5, abs=0.1)  # truncation takes half a level


def test_impulses_are_as_many_as_asked_and_black_as_often_as_white() -> None:
    gray = torch.full((30, 3, 32, 32), 100, dtype=torch.uint8)
    found = ImpulseNoise()(gray, 5, range(30))
    black, white = ((found == value).float().mean().item() for value in (0, 255))
    assert black == pytest.approx(0.035, abs=0.003)
    assert white == pytest.approx(0.035, abs=0.003)
