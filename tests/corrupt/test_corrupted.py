"""A corrupted data set: what is corrupted, what is not, and that it is the same every time."""

from __future__ import annotations

import pytest
import torch

from galago.corrupt.corrupted import Corrupted
from galago.corrupt.digital import Saturate
from galago.corrupt.noise import GaussianNoise
from galago.corrupt.weather import Fog
from galago.datasets.digits import Digits
from galago.errors import UserError
from galago.spec import build, describe


def digits() -> Digits:
    return Digits(batch_size=64, size=32)


def images(loader) -> torch.Tensor:
    return torch.cat([batch.input for batch in loader])


def test_validation_and_test_are_corrupted_and_training_is_not() -> None:
    clean, data = digits(), Corrupted(digits(), Fog(), 4)
    assert not torch.equal(images(data.validation()), images(clean.validation()))
    assert not torch.equal(images(data.test()), images(clean.test()))
    assert not torch.equal(data.example(), clean.example())
    assert torch.equal(images(data.train(1)), images(clean.train(1)))


def test_every_image_is_corrupted_as_the_type_itself_does() -> None:
    clean, data = digits(), Corrupted(digits(), GaussianNoise(), 4)
    for batch, expected in zip(data.test(), clean.test(), strict=True):
        assert torch.equal(batch.input, GaussianNoise()(expected.input, 4, expected.extra["index"].tolist()))


def test_training_images_are_corrupted_alike_in_an_interrupted_epoch() -> None:
    data = Corrupted(digits(), Fog(), 3, training=True)
    data.seed = 5
    whole, rest = list(data.train(2)), list(data.train(2, start=4))
    assert all(torch.equal(one.input, other.input) for one, other in zip(whole[4:], rest, strict=True))


def test_order_follows_the_run_s_seed_and_the_given_set_keeps_its_own() -> None:
    given = digits()
    data = Corrupted(given, Fog())
    data.seed = 3
    plain = digits()
    plain.seed = 3
    assert torch.equal(images(data.train()), images(plain.train()))
    assert given.seed == 0


def test_it_can_be_written_down() -> None:
    again = build(describe(Corrupted(digits(), Fog(), 2, training=True)))
    assert isinstance(again, Corrupted)
    assert isinstance(again.corruption, Fog)
    assert (again.severity, again.training, again.batch_size) == (2, True, 64)


def test_what_cannot_be_corrupted_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="Corrupted: severity is 0; give one from 1 to 5"):
        Corrupted(digits(), Fog(), 0)
    with pytest.raises(UserError, match="saturate: it changes colors"):
        Corrupted(digits(), Saturate())
