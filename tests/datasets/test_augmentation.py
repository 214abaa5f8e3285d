from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from galago.datasets.augmentation import Augmentation, crop, mix, seeds_of, uniform
from galago.errors import UserError

IMAGES = torch.arange(6 * 3 * 5 * 7, dtype=torch.uint8).view(6, 3, 5, 7)
SEEDS = seeds_of(seed=0, epoch=0, index=torch.arange(6))


class Jitter(nn.Module):
    """Draws from all three generators that a transform may draw from."""

    def forward(self, image: Tensor) -> Tensor:
        shift = int(torch.randint(50, ())) + random.randrange(50) + int(np.random.randint(50))  # noqa: NPY002
        return image + torch.tensor(shift, dtype=torch.uint8)


class SlowCrop(v2.RandomCrop):
    """The same, but unknown to the batched way."""


def test_the_mixing_function_is_split_mix_64() -> None:
    # First outputs of the published generator for seed 1234567, whose state grows by the same odd constant.
    golden = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = np.array([1234567], dtype=np.uint64) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == golden


def test_seeds_differ_between_runs_epochs_and_images() -> None:
    index = torch.arange(500)
    every = [seeds_of(seed, epoch, index) for seed in (-1, 0, 1) for epoch in (0, 1, 2)]
    assert len(np.unique(np.concatenate(every))) == 9 * 500


def test_draws_are_uniform_and_unrelated() -> None:
    seeds = seeds_of(3, 1, torch.arange(20_000))
    first, second = uniform(seeds, 0), uniform(seeds, 1)
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    counts = torch.histc(first, 10, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 30, "chi-square with 9 degrees of freedom"
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.03


def test_a_batched_crop_cuts_each_image_where_its_numbers_say() -> None:
    down, right = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    found = crop(IMAGES, v2.RandomCrop((4, 3), padding=2), (down, right))
    padded = v2.functional.pad(IMAGES, [2])
    for image, whole, d, r in zip(found, padded, down, right, strict=True):
        top, left = int(d * (9 - 4 + 1)), int(r * (11 - 3 + 1))
        assert torch.equal(image, whole[:, top : top + 4, left : left + 3])


def test_every_place_of_a_batched_crop_occurs_equally_often() -> None:
    seeds = seeds_of(0, 0, torch.arange(9000))
    image = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3).expand(9000, -1, -1, -1)
    counts = torch.bincount(Augmentation([v2.RandomCrop(1)])(image, seeds).flatten().long(), minlength=9)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 26, "chi-square with 8 degrees of freedom"


@pytest.mark.parametrize(("transform", "dimension"), [(v2.RandomHorizontalFlip, 2), (v2.RandomVerticalFlip, 1)])
def test_a_batched_flip_turns_about_its_share_of_the_images(transform: type[nn.Module], dimension: int) -> None:
    many = IMAGES[:1].expand(4000, -1, -1, -1)
    found = Augmentation([transform(p=0.25)])(many, seeds_of(0, 0, torch.arange(4000)))
    turned = sum(torch.equal(image, IMAGES[0].flip(dimension)) for image in found)
    same = sum(torch.equal(image, IMAGES[0]) for image in found)
    assert turned + same == 4000
    assert 900 < turned < 1100


@pytest.mark.parametrize(
    "transforms",
    [
        [v2.RandomCrop((4, 5), padding=1), v2.RandomHorizontalFlip()],
        [v2.Compose([v2.RandomHorizontalFlip(), v2.Compose([Jitter(), v2.RandomCrop(4)])])],
        [Jitter(), SlowCrop((4, 5), padding=1)],
    ],
)
def test_an_image_is_augmented_alike_in_whatever_company(transforms: list[nn.Module]) -> None:
    augmentation = Augmentation(transforms)
    together = list(augmentation(IMAGES, SEEDS))
    alone = [next(iter(augmentation(IMAGES[i : i + 1], SEEDS[i : i + 1]))) for i in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    other = list(augmentation(IMAGES, seeds_of(0, 1, torch.arange(6))))
    assert not all(torch.equal(a, b) for a, b in zip(together, other, strict=True))


def test_images_of_different_sizes_are_augmented_one_by_one() -> None:
    images = [torch.zeros(3, 8 + i, 9, dtype=torch.uint8) for i in range(3)]
    found = Augmentation([v2.RandomCrop(6), v2.RandomHorizontalFlip()])(images, SEEDS[:3])
    assert [tuple(image.shape) for image in found] == [(3, 6, 6)] * 3


def test_augmenting_leaves_the_global_generators_alone() -> None:
    def draws() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002

    torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002
    before = draws()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002
    Augmentation([Jitter(), v2.RandomCrop(3)])(IMAGES, SEEDS)
    assert draws() == before


def test_the_given_images_are_not_written_to() -> None:
    before = IMAGES.clone()
    Augmentation([v2.RandomCrop(5, padding=2, pad_if_needed=True), v2.RandomHorizontalFlip(1.0)])(IMAGES, SEEDS)
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (v2.RandomCrop(64), "RandomCrop failed on an image of 3×5×7"),
        (SlowCrop(64), "SlowCrop failed on an image of 3×5×7"),
        (v2.ToDtype(torch.float32, scale=True), "leave out ToDtype"),
        (nn.Linear(2, 2), "Linear failed"),
    ],
)
def test_a_transform_that_cannot_be_used_is_named(transform: nn.Module, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Augmentation([transform])(IMAGES, SEEDS)
