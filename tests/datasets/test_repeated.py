"""Several passes as one epoch: the same batches, from any of them on."""

from __future__ import annotations

import pytest
import torch

from galago.datasets.digits import Digits
from galago.datasets.repeated import Repeated
from galago.errors import UserError
from galago.spec import build, describe


def test_an_epoch_is_the_passes_one_after_another() -> None:
    data, plain = Repeated(Digits(batch_size=200), times=3), Digits(batch_size=200)
    data.seed = plain.seed = 4
    expected = [batch for number in (6, 7, 8) for batch in plain.train(number)]
    found = list(data.train(2))
    assert len(data.train(2)) == len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.input, other.input)
        assert torch.equal(one.extra["index"], other.extra["index"])


def test_it_begins_with_any_batch() -> None:
    data = Repeated(Digits(batch_size=300), times=3)
    whole = list(data.train(1))
    for start in range(len(whole) + 1):
        rest = data.train(1, start)
        assert len(rest) == len(whole) - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert torch.equal(one.extra["index"], other.extra["index"])


def test_what_is_measured_on_is_that_of_the_data() -> None:
    given = Digits(batch_size=300)
    data = Repeated(given)
    assert torch.equal(data.example(), given.example())
    assert (data.images, data.classes, data.batch_size) == (given.images, given.classes, 300)
    for one, other in ((data.validation(), given.validation()), (data.test(), given.test())):
        assert torch.equal(next(iter(one)).input, next(iter(other)).input)


def test_it_can_be_written_down_and_no_pass_at_all_is_refused() -> None:
    again = build(describe(Repeated(Digits(), 7)))
    assert isinstance(again, Repeated)
    assert again.times == 7
    with pytest.raises(UserError, match="times is 0"):
        Repeated(Digits(), 0)
