"""What all types promise: shape and type, randomness for each image by itself, more harm with severity, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galago.corrupt.blur import GaussianBlur
from galago.corrupt.corruption import Corruption
from galago.corrupt.digital import Saturate
from galago.corrupt.noise import GaussianNoise
from galago.corrupt.published import benchmark, extra
from galago.errors import UserError
from photographs import photograph

TYPES = benchmark() + extra()
every_type = pytest.mark.parametrize("corruption", TYPES, ids=lambda corruption: corruption.name)


def images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(
    ("corruption", "shape"),
    [
        pytest.param(corruption, shape, id=f"{corruption.name}-{'x'.join(map(str, shape))}")
        for corruption in TYPES
        for shape in [(2, 3, 8, 8), (2, 3, 28, 40), (2, 1, 28, 28)]
        if shape[1] == 3 or not corruption.needs_color
    ],
)
def test_shape_and_type_stay(corruption: Corruption, shape: tuple[int, ...]) -> None:
    given = images(*shape)
    before = given.clone()
    for severity in (1, 5):
        found = corruption(given, severity, [0, 1])
        assert found.shape == given.shape
        assert found.dtype == torch.uint8
    assert torch.equal(given, before)


@every_type
def test_an_image_is_corrupted_alike_whatever_batch_it_is_in(corruption: Corruption) -> None:
    given = images(5, 3, 32, 32)
    found = corruption(given, 4, range(10, 15))
    assert torch.equal(found, corruption(given, 4, range(10, 15)))
    assert (found[3:4].short() - corruption(given[3:4], 4, [13]).short()).abs().max() <= 1  # sums in another order


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "snow", "fog", "elastic_transform", "spatter"])
def test_another_index_is_corrupted_otherwise(name: str) -> None:
    (corruption,) = (one for one in TYPES if one.name == name)
    first, second = corruption(images(1, 3, 32, 32).expand(2, -1, -1, -1), 3, [0, 1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("at_once", [1, 10_000])
def test_how_many_are_worked_on_together_changes_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, noise = images(7, 3, 16, 16), GaussianNoise()
    expected = noise(given, 2, range(7))
    monkeypatch.setattr(GaussianNoise, "values_at_once", at_once)
    assert torch.equal(noise(given, 2, range(7)), expected)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur"])
def test_harm_grows_with_severity(name: str) -> None:
    (corruption,) = (one for one in TYPES if one.name == name)
    clean = photograph("deterministic", 64)
    harm = [(corruption(clean, s, [0]).float() - clean.float()).abs().mean().item() for s in range(1, 6)]
    assert harm == sorted(harm)


def test_a_black_and_a_white_image_stay_finite_and_in_range() -> None:
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    for corruption in TYPES:
        corruption(extremes, 5, [0, 1])
    assert torch.equal(GaussianBlur()(extremes, 5, [0, 1]), extremes)


def test_no_images_give_no_images() -> None:
    assert GaussianNoise()(images(0, 3, 32, 32), 1, []).shape == (0, 3, 32, 32)


def test_what_cannot_be_corrupted_is_refused() -> None:
    with pytest.raises(UserError, match="severity is 6; give one from 1 to 5"):
        GaussianNoise()(images(1, 3, 8, 8), 6, [0])
    with pytest.raises(UserError, match="images must be uint8, N×1×H×W or N×3×H×W"):
        GaussianNoise()(images(1, 4, 8, 8), 1, [0])
    with pytest.raises(UserError, match="images must be uint8"):
        GaussianNoise()(images(1, 3, 8, 8).float(), 1, [0])
    with pytest.raises(UserError, match="images of 8×7 are too small"):
        GaussianNoise()(images(1, 3, 8, 7), 1, [0])
    with pytest.raises(UserError, match="saturate: it changes colors"):
        Saturate()(images(1, 1, 8, 8), 1, [0])
    with pytest.raises(ValueError, match="2 images need as many indices"):
        GaussianNoise()(images(2, 3, 8, 8), 1, [0])
