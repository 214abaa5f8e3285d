"""Batches of a few classes with several images each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from galago.data import Loader
from galago.datasets.balance import class_batches, groups
from galago.datasets.digits import Digits
from galago.errors import UserError


def drawing(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(counts: list[int]) -> Tensor:
    """So many images of each class, shuffled."""
    label = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return label[torch.randperm(len(label), generator=drawing(1))]


def indices(loader: Loader) -> list[list[int]]:
    return [batch.extra["index"].tolist() for batch in loader]


@pytest.mark.parametrize("counts", [[12, 12, 12, 12], [40, 4, 9, 13, 4], [3, 5, 100]])
def test_every_batch_holds_as_many_images_of_each_of_its_classes(counts: list[int]) -> None:
    label = labels_of(counts)
    batches = class_batches(label, 6, 3, drawing())
    assert batches
    for batch in batches:
        classes, count = label[batch].unique(return_counts=True)
        assert len(classes) == 2
        assert (count == 3).all()
    shown = torch.cat(batches)
    assert len(shown.unique()) == len(shown), "no image comes twice"


def test_groups_keep_the_order_of_each_class_and_leave_its_rest_out() -> None:
    label = labels_of([5, 2, 1])
    found = groups(label, 2)
    by_class = [(label == k).nonzero().flatten().tolist() for k in range(3)]
    assert found.tolist() == [by_class[0][:2], by_class[0][2:4], by_class[1]]


def test_as_many_batches_are_full_as_can_be() -> None:
    assert len(class_batches(labels_of([12, 12, 12, 12]), 6, 3, drawing())) == 8
    assert len(class_batches(labels_of([12, 12, 12]), 6, 3, drawing())) == 6
    assert len(class_batches(labels_of([30, 3, 3, 3]), 6, 3, drawing())) == 3, "one of the large class in each"


def test_classes_meet_by_chance() -> None:
    label = labels_of([2] * 6)
    pairs = {
        tuple(sorted(label[batch].unique().tolist()))
        for s in range(200)
        for batch in class_batches(label, 4, 2, drawing(s))
    }
    assert len(pairs) == 15


def test_an_epoch_of_a_data_set_is_a_function_of_seed_and_number() -> None:
    data = Digits(batch_size=40, together=5)
    first = indices(data.train(1))
    assert first == indices(Digits(batch_size=40, together=5).train(1))
    assert first[7:] == indices(data.train(1, start=7))
    assert first != indices(data.train(2))
    data.seed = 3
    assert first != indices(data.train(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_gives_batches_of_few_classes(workers: int) -> None:
    data = Digits(batch_size=40, together=5, workers=workers, per_class=25)
    batches = list(data.train())
    assert len(batches) == 6, "five groups of each of ten classes, eight in a batch"
    for batch in batches:
        assert sorted(batch.target.sum(0).tolist()) == [0, 0] + [5] * 8


def test_what_one_epoch_leaves_out_another_shows() -> None:
    data = Digits(batch_size=40, together=5, per_class=8)
    seen = {index for epoch in range(12) for batch in indices(data.train(epoch)) for index in batch}
    assert len(seen) == 80


def test_without_it_an_epoch_is_what_it_was() -> None:
    whole = Digits(batch_size=40)
    assert len(whole.train()) == 1078 // 40
    assert len({index for batch in indices(whole.train()) for index in batch}) == 1078 // 40 * 40


def test_validation_is_not_touched() -> None:
    assert indices(Digits(batch_size=40, together=5).validation()) == indices(Digits(batch_size=40).validation())


def _load_share(rank: int, world: int, folder: str) -> None:
    """What one of several training processes does."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(indices(Digits(batch_size=40, together=5).train(1)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_the_batches_of_an_epoch_evenly(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_load_share, (2, str(tmp_path)), nprocs=2, start_method="fork")
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = indices(Digits(batch_size=40, together=5).train(1))
    assert len(shares[0]) == len(shares[1]) == len(whole) // 2
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == whole[: len(whole) // 2 * 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 64, "together": 5}, "batches of 64 images cannot hold 5 of each class; name a divisor"),
        ({"batch_size": 64, "together": 0}, "cannot hold 0"),
        ({"batch_size": 64, "together": 4}, "need 16 classes, and there are 10"),
        ({"batch_size": 400, "together": 200}, "200 images of each class are wanted; there are fewer of 0 "),
        ({"batch_size": 40, "together": 5, "per_class": 4}, r"fewer of 0 \(4\), 1 \(4\)"),
    ],
)
def test_batches_that_cannot_be_are_refused_before_training(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Digits(**arguments)
