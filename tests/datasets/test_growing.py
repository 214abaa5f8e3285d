"""A training set that grows: stage tables, nested parts, and a training that notices nothing but more images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from galago.data import Data
from galago.datasets.degraded import NoisyLabels
from galago.datasets.digits import Digits
from galago.datasets.growing import (
    ConstantNoise,
    Growing,
    WarmRestarts,
    full_epochs,
    stage_at,
    stage_batch,
    stage_counts,
)
from galago.errors import UserError
from galago.models.tiny import tiny
from galago.run import Run
from galago.schedule import Constant, Schedule
from galago.spec import build, describe
from galago.tasks.classify import Classify
from galago.train import train

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "progressive_stepwise.npz")
FRACTIONS, EPOCHS = GOLDEN["fractions"].tolist(), GOLDEN["stage_epochs"].tolist()
STARTS = [(sum(EPOCHS[:stage])) / sum(EPOCHS) for stage in range(4)]


def index(data: Data, epoch: int) -> Tensor:
    return torch.cat([batch.extra["index"] for batch in data.train(epoch)])


def test_stage_tables_are_the_golden_ones() -> None:
    sizes, rate, batch = torch.from_numpy(GOLDEN["class_counts"]), float(GOLDEN["full_lr"]), int(GOLDEN["full_batch"])
    counts = [stage_counts(sizes, fraction).tolist() for fraction in FRACTIONS]
    assert counts == GOLDEN["stage_class_counts"].tolist()
    assert [stage_batch(batch, fraction) for fraction in FRACTIONS] == GOLDEN["constant_noise_batch"].tolist()
    for schedule, name in ((ConstantNoise(EPOCHS), "constant_noise_lr"), (WarmRestarts(EPOCHS), "warm_restart_lr")):
        found = [rate * schedule(start) for start in STARTS]
        assert found == pytest.approx(GOLDEN[name].tolist(), abs=1e-12)
    assert full_epochs(EPOCHS, FRACTIONS) == float(GOLDEN["cost_full_data_epochs"])


def test_noise_is_constant_but_for_the_rounding_of_a_batch() -> None:
    for fraction in np.linspace(0.15, 1, 30).tolist():
        batch = stage_batch(256, fraction)
        noise = fraction / batch * 256
        assert abs(noise - 1) <= 4 / batch + 1e-9 or batch == 16


@pytest.mark.parametrize("schedule", [ConstantNoise([3, 1, 2]), WarmRestarts([3, 1, 2], [0.2, 0.4, 1.0])])
def test_rates_rise_only_where_a_stage_begins_and_end_at_nothing(schedule: Schedule) -> None:
    factors = [schedule(step / 600) for step in range(601)]
    rises = {step for step in range(1, 601) if factors[step] > factors[step - 1] + 1e-12}
    assert rises <= {300, 400}
    assert factors[-1] == pytest.approx(0, abs=1e-9)
    assert max(factors) <= 1


def test_a_stage_begins_with_its_first_epoch_whatever_rounding_does() -> None:
    for epochs in ([1, 2, 3], [7, 7, 7, 15], [25, 25, 25, 50]):
        total = sum(epochs)
        for epoch in range(total):
            assert stage_at(epoch / total * total, epochs)[0] == stage_at(epoch, epochs)[0]


def test_parts_are_nested_shares_of_each_class_and_the_last_is_the_full_set() -> None:
    whole, data = Digits(batch_size=1), Growing(Digits(batch_size=1), [1, 1, 1, 1])
    sizes = torch.bincount(whole.training.source.labels[whole.training.positions])
    before: set[int] = set()
    for epoch, fraction in enumerate(FRACTIONS):
        now = set(index(data, epoch).tolist())
        assert before < now
        counts = torch.bincount(whole.training.source.labels[sorted(now)])
        assert counts.tolist() == stage_counts(sizes, fraction).tolist()
        assert (counts - fraction * sizes).abs().max() <= 1
        before = now
    assert before == set(index(whole, 0).tolist())
    assert torch.equal(index(Growing(Digits(batch_size=1), [1, 1, 1, 1]), 1), index(data, 1))
    assert set(index(Growing(Digits(batch_size=1), [1] * 4, growth_seed=1), 0).tolist()) != set(index(data, 0).tolist())


def test_as_many_images_are_processed_as_stages_hold() -> None:
    data = Growing(Digits(batch_size=1), [2, 1, 1, 2])
    processed = sum(len(index(data, epoch)) for epoch in range(6))
    held = [len(part.training.positions) for part in data.stages]
    assert processed == 2 * held[0] + held[1] + held[2] + 2 * held[3]


def test_batches_are_smaller_in_early_stages_if_asked_for() -> None:
    data = Growing(Digits(batch_size=64), [1, 1, 1, 1], smaller_batches=True)
    sizes = []
    for epoch in range(4):
        sizes.append(len(next(iter(data.train(epoch))).input))
        assert data.batch_size == sizes[-1]
    assert sizes == [16, 32, 48, 64]


def test_an_epoch_is_a_function_of_its_number_from_any_batch_on() -> None:
    data, again = Growing(Digits(batch_size=32), [1, 1, 1, 1]), Growing(Digits(batch_size=32), [1, 1, 1, 1])
    list(data.train(0))
    for one, other in zip(list(data.train(2))[3:], again.train(2, start=3), strict=True):
        assert torch.equal(one.input, other.input)
        assert torch.equal(one.extra["index"], other.extra["index"])


def trained(data: Data, folder: Path, epochs: int = 2, schedule: Schedule | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = tiny(width=4)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    factor = Constant() if schedule is None else schedule
    return train(model, Classify(10), data, folder, epochs, (), sgd, factor, accelerator="cpu").state_dict()


def test_one_stage_with_all_images_is_bit_for_bit_training_as_ever(tmp_path: Path) -> None:
    plain = trained(Digits(batch_size=64), tmp_path / "plain")
    growing = trained(Growing(Digits(batch_size=64), [2], [1.0], smaller_batches=True), tmp_path / "growing")
    assert all(torch.equal(plain[name], growing[name]) for name in plain)


class Stopped(Exception):  # noqa: N818 - stands for a power cut
    pass


class Breaking(WarmRestarts):
    """Breaks off at a moment."""

    def __call__(self, progress: float) -> float:
        if progress > 0.6:
            raise Stopped
        return super().__call__(progress)


def test_what_was_stopped_in_a_later_stage_goes_on_bit_for_bit(tmp_path: Path) -> None:
    stages = [1, 1], [0.5, 1.0]
    straight = trained(Growing(Digits(batch_size=64), *stages), tmp_path / "one", 2, WarmRestarts(*stages))
    with pytest.raises(Stopped):
        trained(Growing(Digits(batch_size=64), *stages), tmp_path / "two", 2, Breaking(*stages))
    resumed = trained(Growing(Digits(batch_size=64), *stages), tmp_path / "two", 2, WarmRestarts(*stages))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    steps = [line["step"] for line in Run(tmp_path / "two").history() if line["kind"] == "epoch"]
    images = len(Digits().training.positions)
    assert steps == [images // 2 // 64, images // 2 // 64 + images // 64]


def test_a_person_is_told_of_each_stage_and_what_all_cost(capsys: pytest.CaptureFixture[str]) -> None:
    data = Growing(Digits(batch_size=64), [1, 3], [0.5, 1.0])
    for epoch in range(4):
        data.train(epoch)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "stage 1/2, epochs 1 to 1" in lines[0]
    assert "all 4 epochs cost 3.5 of the full set" in lines[0]
    assert "stage 2/2, epochs 2 to 4" in lines[1]


def test_a_damaged_set_may_grow_and_what_is_measured_on_stays() -> None:
    damaged = NoisyLabels(Digits(batch_size=16), 0.5)
    data = Growing(damaged, [1, 1], [0.5, 1.0])
    by_number = damaged.damaged.training.source.labels
    batch = next(iter(data.train(0)))
    assert torch.equal(batch.target.argmax(1), by_number[batch.extra["index"]])
    assert torch.equal(data.example(), damaged.example())
    for loader in ("validation", "test"):
        first, second = (torch.cat([batch.input for batch in getattr(one, loader)()]) for one in (data, damaged))
        assert torch.equal(first, second)


def test_it_can_be_written_down() -> None:
    again = build(describe(Growing(Digits(batch_size=16), [1, 2], [0.3, 1.0], True, 5)))
    assert isinstance(again, Growing)
    assert (again.epochs, again.fractions, again.smaller_batches, again.growth_seed) == ([1, 2], [0.3, 1.0], True, 5)


@pytest.mark.parametrize(
    ("epochs", "fractions", "words"),
    [([1, 1], [0.5, 0.9], "rise"), ([1, 1], [1.0, 0.5], "rise"), ([1], [0.5, 1.0], "each of 2"), ([0], [1.0], "1 or")],
)
def test_impossible_stages_are_refused(epochs: list[int], fractions: list[float], words: str) -> None:
    for kind in (partial(Growing, Digits()), WarmRestarts):
        with pytest.raises(UserError, match=words):
            kind(epochs, fractions)


def test_more_epochs_than_the_stages_have_are_refused() -> None:
    with pytest.raises(UserError, match="end after 2; set the recipe's epochs to that"):
        Growing(Digits(), [1, 1], [0.5, 1.0]).train(2)
