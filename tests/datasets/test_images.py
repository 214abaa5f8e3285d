from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from galago.batch import Batch
from galago.data import Loader
from galago.datasets.images import ImageData, Sources
from galago.datasets.source import Pixels
from galago.errors import UserError


def pixels(count: int, first: int = 0) -> Pixels:
    """Images whose first pixel is their number."""
    images = torch.randint(0, 256, (count, 1, 6, 6), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    images[:, 0, 0, 0] = torch.arange(first, first + count)
    return Pixels(images, torch.arange(count) % 4)


class Numbers(ImageData):
    """Images of one's own, as a user would write it."""

    def __init__(
        self,
        workers: int = 0,
        batch_size: int = 8,
        hold_out: float = 0,
        per_class: int | None = None,
        augment: list[nn.Module] | None = None,
        test: bool = True,
        classes: int = 4,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.25,),
    ) -> None:
        super().__init__(
            Sources(pixels(60), test=pixels(20, first=100) if test else None),
            [f"class {k}" for k in range(classes)],
            mean=mean,
            std=std,
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out,
            split_seed=0,
            per_class=per_class,
            augment=augment or [],
        )


SLOW = [v2.RandomCrop(6, padding=2), v2.ColorJitter(0.5)]


def equal(first: Batch, second: Batch) -> bool:
    one, two = ((batch.input, batch.target, batch.extra["index"]) for batch in (first, second))
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def indices(loader: Loader) -> list[int]:
    return [int(i) for batch in loader for i in batch.extra["index"]]


def test_a_batch_holds_raw_images_class_probabilities_and_indices() -> None:
    data = Numbers()
    for batch in data.train():
        assert batch.input.shape == (8, 1, 6, 6)
        assert batch.input.dtype == torch.uint8
        assert batch.target.shape == (8, 4)
        assert batch.target.dtype == torch.float32
        assert torch.equal(batch.target.argmax(1), batch.extra["index"] % 4)
        assert torch.equal(batch.target.sum(1), torch.ones(8))
        assert torch.equal(batch.input[:, 0, 0, 0], batch.extra["index"].to(torch.uint8))


def test_an_epoch_shows_each_image_at_most_once_in_full_batches() -> None:
    data = Numbers()
    seen = indices(data.train(epoch=3))
    assert len(data.train(3)) == 7
    assert len(seen) == len(set(seen)) == 56


def test_what_one_epoch_leaves_out_another_shows() -> None:
    data = Numbers()
    assert {i for epoch in range(4) for i in indices(data.train(epoch))} == set(range(60))


@pytest.mark.parametrize("workers", [1, 3])
def test_an_epoch_is_the_same_whoever_loads_it(workers: int) -> None:
    alone, helped = Numbers(0, augment=SLOW), Numbers(workers, augment=SLOW)
    for first, second in zip(alone.train(2), helped.train(2), strict=True):
        assert equal(first, second)


def test_order_and_augmentation_follow_seed_and_epoch() -> None:
    data = Numbers(augment=SLOW)
    first, again, next_epoch = (next(iter(data.train(epoch))) for epoch in (0, 0, 1))
    data.seed = 1
    other_seed = next(iter(data.train(0)))
    assert equal(first, again)
    for other in (next_epoch, other_seed):
        assert not torch.equal(first.extra["index"], other.extra["index"])


def test_an_image_is_augmented_differently_in_each_epoch() -> None:
    data = Numbers(batch_size=60, augment=SLOW)
    first, second = (next(iter(data.train(epoch))) for epoch in (0, 1))
    assert not torch.equal(first.input[first.extra["index"].argsort()], second.input[second.extra["index"].argsort()])


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_late_gives_the_rest_of_the_same_epoch(workers: int) -> None:
    data = Numbers(workers, augment=SLOW)
    whole, rest = list(data.train(1)), list(data.train(1, start=5))
    assert len(data.train(1, start=5)) == len(rest) == 2
    assert all(equal(a, b) for a, b in zip(whole[5:], rest, strict=True))
    assert len(data.train(1, start=7)) == 0
    assert list(data.train(1, start=7)) == []


def test_batches_before_the_start_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = Numbers(), []
    take = data.training.source.take

    def watch(positions: Tensor):
        asked.append(positions)
        return take(positions)

    monkeypatch.setattr(data.training.source, "take", watch)
    list(data.train(0, start=5))
    assert len(asked) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_no_random_number_of_the_training_process(workers: int) -> None:
    data = Numbers(workers, augment=SLOW)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(data.train()), list(data.validation()), data.example()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_validation_is_whole_and_unaugmented_and_in_order() -> None:
    data = Numbers(augment=SLOW)
    assert torch.equal(torch.cat([batch.input for batch in data.validation()]), pixels(20, first=100).images)
    assert [len(batch.input) for batch in data.validation()] == [8, 8, 4]


def test_plain_training_images_are_all_of_them_unaugmented_and_shuffled_once() -> None:
    data = Numbers(augment=SLOW, hold_out=20)
    batches = list(data.plain())
    index = torch.cat([batch.extra["index"] for batch in batches])
    assert sorted(index.tolist()) == sorted(data.training.positions.tolist()) != index.tolist()
    for batch in batches:
        assert torch.equal(batch.input, pixels(60).images[batch.extra["index"]])
        assert torch.equal(batch.target.argmax(1), batch.extra["index"] % 4)
    data.seed = 9
    assert all(equal(one, other) for one, other in zip(batches, data.plain(), strict=True))


def test_held_out_images_are_validated_on_and_never_trained_on() -> None:
    data = Numbers(hold_out=12)
    held, trained = indices(data.validation()), indices(data.train())
    assert len(held) == 12
    assert not set(held) & set(trained)
    assert torch.equal(torch.cat([batch.input for batch in data.test()]), pixels(20, first=100).images)
    other = Numbers(hold_out=12)
    other.seed = 5
    assert indices(other.validation()) == held, "the run's seed does not move images between the parts"


def test_without_a_test_set_the_held_out_images_are_tested_on() -> None:
    data = Numbers(hold_out=0.2, test=False)
    assert indices(data.test()) == indices(data.validation())
    with pytest.raises(UserError, match="hold_out"):
        Numbers(test=False)


def test_few_images_of_a_class_restrict_training_alone() -> None:
    data = Numbers(per_class=2)
    assert len(data.train()) == 1
    assert torch.cat([batch.target for batch in data.train()]).sum(0).tolist() == [2, 2, 2, 2]
    assert len(indices(data.validation())) == 20
    assert data.images == 60


def test_an_example_is_a_raw_validation_image() -> None:
    assert torch.equal(Numbers(augment=SLOW).example(), pixels(20, first=100).images[:1])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (v2.RandomCrop(64), "augment: RandomCrop failed"),
        (v2.RandomCrop(4), "gives images of 1×4×4 and must give 1×6×6"),
    ],
)
def test_a_useless_augmentation_is_a_plain_error_even_in_a_worker(
    transform: nn.Module, said: str, workers: int
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        list(Numbers(workers, augment=[transform]).train())
    assert "Traceback" not in str(caught.value)


class Die(nn.Module):
    """Stands for a worker that the system kills for lack of memory."""

    def forward(self, image: Tensor) -> Tensor:
        os._exit(1)


def test_the_death_of_a_worker_is_a_plain_error() -> None:
    with pytest.raises(UserError, match="workers: a process that loads images died"):
        list(Numbers(1, augment=[Die()]).train())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 61}, "60 training images are not enough for one batch of 61"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"workers": -1}, "workers -1"),
        ({"classes": 3}, "labels run from 0 to 3 but there are 3 classes"),
        ({"mean": (0.1, 0.2)}, "each of 1 channels, not 2 and 1"),
        ({"std": (0.0,)}, "std must be above 0"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Numbers(**arguments).train()


def _load_share(rank: int, world: int, folder: str) -> None:
    """What one of several training processes does."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    data = Numbers(augment=SLOW)
    batches = list(data.train(1))
    inputs = torch.stack([batch.input for batch in batches])
    index = torch.stack([batch.extra["index"] for batch in batches])
    torch.save({"input": inputs, "index": index, "held": indices(data.validation())}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_an_epoch_evenly_and_see_all_of_validation(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_load_share, (2, str(tmp_path)), nprocs=2, start_method="fork")
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert shares[0]["index"].shape == shares[1]["index"].shape == (3, 8)
    together = torch.stack([share["index"] for share in shares], dim=2).flatten(1)
    whole = list(Numbers(batch_size=16, augment=SLOW).train(1))
    assert torch.equal(together, torch.stack([batch.extra["index"] for batch in whole]))
    images = torch.stack([share["input"] for share in shares], dim=2).flatten(1, 2)
    assert torch.equal(images, torch.stack([batch.input for batch in whole]))
    assert shares[0]["held"] == shares[1]["held"] == list(range(20))
