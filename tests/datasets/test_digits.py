from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from galago.datasets.digits import Digits
from galago.errors import UserError
from galago.spec import build, describe


def all_images(data: Digits) -> torch.Tensor:
    parts = [torch.cat([b.input for b in loader]) for loader in (data.validation(), data.test())]
    return torch.cat([*parts, data.training.source.images[data.training.positions]])


def test_every_published_digit_is_in_exactly_one_part() -> None:
    published = torch.from_numpy(load_digits().images).flatten(1)
    mine = all_images(Digits())
    assert mine.shape == (1797, 1, 8, 8)
    back = (mine.double() * 16 / 255).round().flatten(1)
    assert sorted(back.tolist()) == sorted(published.tolist())


def test_the_parts_are_stratified() -> None:
    data = Digits()
    for loader, total in ((data.validation(), 360), (data.test(), 359)):
        counts = torch.cat([batch.target for batch in loader]).sum(0)
        assert int(counts.sum()) == total
        assert counts.min() >= 33
        assert counts.max() <= 38


def test_the_parts_do_not_depend_on_the_runs_seed() -> None:
    first, second = Digits(), Digits()
    second.seed = 9
    assert torch.equal(all_images(first), all_images(second))


def test_normalized_digits_have_mean_0_and_deviation_1() -> None:
    data = Digits()
    images = data.normalize(all_images(data))
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


def test_training_digits_are_shifted_unless_told_otherwise() -> None:
    plain, moved = (next(iter(Digits(augment=a).train())) for a in ([], None))
    assert torch.equal(plain.extra["index"], moved.extra["index"])
    same = (plain.input == moved.input).flatten(1).all(1).float().mean()
    assert 0.02 < float(same) < 0.3, "about one in nine stays where it is"


def test_larger_digits_can_be_had() -> None:
    data = Digits(size=16)
    assert data.example().shape == (1, 1, 16, 16)
    assert next(iter(data.train())).input.shape == (64, 1, 16, 16)
    with pytest.raises(UserError, match="size"):
        Digits(size=4)


def test_a_description_builds_the_same_data_again() -> None:
    data = Digits(batch_size=32, hold_out=100, per_class=5, augment=[v2.RandomCrop(8, padding=2)])
    again = build(describe(data))
    assert isinstance(again, Digits)
    assert describe(again) == describe(data)
    assert torch.equal(next(iter(again.train())).input, next(iter(data.train())).input)
