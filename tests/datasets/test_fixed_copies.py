"""Copies that stay the same: how many different images there are, in which epoch, and with which labels."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from galago.data import Data
from galago.datasets.degraded import NoisyLabels
from galago.datasets.digits import Digits
from galago.datasets.fixed_copies import FixedCopies
from galago.errors import UserError
from galago.spec import build, describe


def digits() -> Digits:
    return Digits(batch_size=10, per_class=3, augment=[v2.RandomCrop(8, padding=3), v2.RandomAffine(30)])


def images(data: Data, epoch: int) -> dict[int, bytes]:
    """What each image of an epoch is, by its number."""
    return {
        int(number): image.numpy().tobytes()
        for batch in data.train(epoch)
        for number, image in zip(batch.extra["index"], batch.input, strict=True)
    }


def test_there_are_as_many_different_images_as_copies_make_and_the_same_in_every_epoch() -> None:
    data = FixedCopies(digits(), copies=4)
    first, second = images(data, 0), images(data, 7)
    assert first == second
    assert len(set(first.values())) == len(first) == data.images == 5 * 3 * 10


def test_with_augmentation_as_usual_they_are_others_in_every_epoch() -> None:
    first, second = images(digits(), 0), images(digits(), 7)
    assert first.keys() == second.keys()
    assert len({*first.values(), *second.values()}) > 1.5 * len(first)


def test_the_images_as_they_are_come_first_and_copies_have_their_labels() -> None:
    plain = Digits(batch_size=10, per_class=3, augment=[])
    data = FixedCopies(digits(), copies=2)
    source, positions = plain.training
    expected = source.take(positions).images
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(data.fixed.training.source.take(torch.arange(30)).images, expected)
    labels = data.fixed.training.source.labels.view(3, 30)
    assert all(torch.equal(row, source.labels[positions]) for row in labels)


def test_the_runs_seed_shuffles_and_only_their_own_changes_the_copies() -> None:
    data, other, third = (FixedCopies(digits(), 2, seed) for seed in (0, 0, 1))
    other.seed = 5
    assert images(data, 0) == images(other, 0)
    order = [next(iter(one.train(0))).extra["index"] for one in (data, other)]
    assert not torch.equal(*order)
    assert images(data, 0) != images(third, 0)


def test_without_copies_it_is_the_set_without_augmentation() -> None:
    plain = Digits(batch_size=10, per_class=3, augment=[])
    assert sorted(images(FixedCopies(digits(), copies=0), 0).values()) == sorted(images(plain, 0).values())


def test_damaged_labels_stay_damaged_and_what_is_measured_on_stays() -> None:
    damaged = NoisyLabels(digits(), 0.8, damage_seed=1)
    data = FixedCopies(damaged, copies=1)
    source, positions = damaged.damaged.training
    assert torch.equal(data.fixed.training.source.labels[:30], source.labels[positions])
    assert torch.equal(data.example(), damaged.example())
    for one, other in ((data.validation(), damaged.validation()), (data.test(), damaged.test())):
        assert torch.equal(next(iter(one)).input, next(iter(other)).input)


def test_it_can_be_written_down_and_fewer_than_no_copies_are_refused() -> None:
    again = build(describe(FixedCopies(Digits(batch_size=16, per_class=2), 3, 2)))
    assert isinstance(again, FixedCopies)
    assert (again.copies, again.copies_seed, again.images) == (3, 2, 80)
    with pytest.raises(UserError, match="copies is -1"):
        FixedCopies(digits(), -1)
