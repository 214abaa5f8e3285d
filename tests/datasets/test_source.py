from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galago.datasets.source import Pixels, Split, everything, few, rank_in_class, set_aside
from galago.errors import UserError

LABELS = torch.tensor([0] * 50 + [1] * 30 + [3] * 20)[torch.randperm(100, generator=torch.Generator().manual_seed(5))]


def split(labels: Tensor = LABELS) -> Split:
    return everything(Pixels(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels))


def labels_of(part: Split) -> Tensor:
    return part.source.labels[part.positions]


@pytest.mark.parametrize(("amount", "counts"), [(0.2, [10, 6, 0, 4]), (50, [25, 15, 0, 10]), (7, [4, 2, 0, 1])])
def test_every_class_gives_the_same_share(amount: float, counts: list[int]) -> None:
    stays, aside = set_aside(split(), amount, seed=0)
    found = torch.bincount(labels_of(aside), minlength=4)
    assert len(aside.positions) == sum(counts)
    assert (found - torch.tensor(counts)).abs().max() <= 1
    assert sorted([*stays.positions.tolist(), *aside.positions.tolist()]) == list(range(100))


def test_the_seed_alone_decides_what_is_set_aside() -> None:
    first, again, other = (set_aside(split(), 0.3, seed)[1].positions for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("amount", [100, 1000, 0.001, 0.999])
def test_setting_aside_nothing_or_everything_is_refused(amount: float) -> None:
    with pytest.raises(UserError, match="hold_out"):
        set_aside(split(), amount, seed=0)


def test_a_class_with_a_single_image_keeps_it_for_training() -> None:
    stays, _ = set_aside(split(torch.tensor([0] * 9 + [1])), 0.3, seed=0)
    assert 1 in labels_of(stays)


def test_ranks_number_each_class_from_zero() -> None:
    rank = rank_in_class(LABELS, seed=3)
    for label, count in ((0, 50), (1, 30), (3, 20)):
        assert sorted(rank[label == LABELS].tolist()) == list(range(count))


def test_few_images_of_each_class_are_kept_and_more_contain_fewer() -> None:
    five, thirty = (set(few(split(), n, seed=0).positions.tolist()) for n in (5, 30))
    assert torch.bincount(LABELS[sorted(five)]).tolist() == [5, 5, 0, 5]
    assert torch.bincount(LABELS[sorted(thirty)]).tolist() == [30, 30, 0, 20]
    assert five < thirty


def test_no_images_of_each_class_are_refused() -> None:
    with pytest.raises(UserError, match="per_class"):
        few(split(), 0, seed=0)
