from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from galago.datasets.loading import Batches, BatchSet, say_once
from galago.datasets.source import Pixels, Taken
from galago.errors import UserError

CHUNKS = list(torch.arange(6).view(3, 2))


class Holes(Pixels):
    """Cannot read the images at odd positions, and none of those from 4 on."""

    def take(self, positions: Tensor) -> Taken:
        kept = positions[(positions % 2 == 0) & (positions < 4)]
        return (
            super()
            .take(kept)
            ._replace(skipped=tuple(f"hole {p}" for p in set(positions.tolist()) - set(kept.tolist())))
        )


def holes() -> Holes:
    return Holes(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.arange(6))


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    say_once.cache_clear()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_makes_a_batch_smaller_and_is_said_once(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = Batches(holes(), CHUNKS[:2], classes=6, workers=workers)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(loader)
    assert [batch.extra["index"].tolist() for batch in batches] == [[0], [2]]
    assert [batch.target.argmax(1).tolist() for batch in batches] == [[0], [2]]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["left out: hole 1", "left out: hole 3"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_which_nothing_is_left_ends_with_a_reason(workers: int) -> None:
    with pytest.raises(UserError, match=r"no image of a whole batch can be read; the first: hole [45]"):
        list(Batches(holes(), CHUNKS, classes=6, workers=workers))


def test_an_error_travels_as_a_sentence() -> None:
    loaded = BatchSet(holes(), CHUNKS, classes=6)[2]
    assert loaded.batch is None
    assert loaded.error is not None
    assert "\n" not in loaded.error


def test_no_more_workers_are_started_than_there_are_batches() -> None:
    loader = Batches(holes(), CHUNKS[:2], classes=6, workers=9)
    assert loader.workers == 2
