"""Corrupted batches: the same image the same way, whatever loader it comes from."""

from __future__ import annotations

import torch

from galago.batch import Batch
from galago.corrupt.loading import CorruptedBatches, Numbered, Thinned
from galago.corrupt.noise import GaussianNoise
from galago.datasets.digits import Digits


def digits(batch_size: int) -> Digits:
    return Digits(batch_size=batch_size, size=32)


def images(loader) -> torch.Tensor:
    return torch.cat([batch.input for batch in loader])


def test_the_size_of_batches_changes_no_image() -> None:
    found = [images(CorruptedBatches(digits(size).test(), GaussianNoise(), 3)) for size in (7, 100)]
    assert torch.equal(*found)


def test_targets_and_what_else_is_known_stay() -> None:
    given = digits(50).test()
    for batch, clean in zip(CorruptedBatches(given, GaussianNoise(), 3), given, strict=True):
        assert torch.equal(batch.target, clean.target)
        assert torch.equal(batch.extra["index"], clean.extra["index"])
        assert not torch.equal(batch.input, clean.input)


def test_images_without_an_index_get_their_place() -> None:
    given = [
        Batch(torch.zeros(2, 1, 8, 8).byte(), torch.eye(2)),
        Batch(torch.zeros(1, 1, 8, 8).byte(), torch.eye(2)[:1]),
    ]
    assert [batch.extra["index"].tolist() for batch in Numbered(given)] == [[0, 1], [2]]
    again = [Batch(batch.input, batch.target, {"index": torch.tensor([9])}) for batch in given[1:]]
    assert next(iter(Numbered(again))).extra["index"].tolist() == [9]


def test_thinned_images_are_corrupted_as_they_are_among_all() -> None:
    given = digits(64).test()
    everything = CorruptedBatches(given, GaussianNoise(), 2)
    index = torch.cat([batch.extra["index"] for batch in everything])
    few = CorruptedBatches(Thinned(given, 20), GaussianNoise(), 2)
    whole, count = images(everything), 0
    for batch in few:
        for image, number in zip(batch.input, batch.extra["index"], strict=True):
            assert torch.equal(image, whole[index == number][0])
            count += 1
    assert 15 <= count <= 20
