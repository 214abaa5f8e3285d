"""Damaged training sets: how many labels are wrong, how many images are left, and what stays as it was."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from galago.datasets.degraded import Degraded, GivenLabels, Imbalanced, NoisyLabels, kept_of_classes, noisy_labels
from galago.datasets.digits import Digits
from galago.errors import UserError
from galago.spec import build, describe


def labels_of(data: Digits | Degraded, epoch: int = 0) -> dict[int, int]:
    """Every training image's label by its index."""
    found: dict[int, int] = {}
    for batch in data.train(epoch):
        found |= dict(zip(batch.extra["index"].tolist(), batch.target.argmax(1).tolist(), strict=True))
    return found


@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_the_share_of_wrong_labels_is_the_formula_s(rate: float) -> None:
    labels = torch.arange(20000) % 10
    wrong = (noisy_labels(labels, 10, rate, seed=3) != labels).float().mean().item()
    expected = rate * (1 - 1 / 10)
    assert abs(wrong - expected) < 3 * math.sqrt(expected * (1 - expected) / 20000)


@pytest.mark.parametrize("factor", [1.0, 10.0, 50.0, 100.0])
def test_sizes_of_classes_are_the_formula_s(factor: float) -> None:
    kept = kept_of_classes(torch.full((10,), 5000), factor, seed=0)
    assert sorted(kept.tolist(), reverse=True) == [round(5000 * (1 / factor) ** (c / 9)) for c in range(10)]


def test_another_seed_makes_other_classes_rare() -> None:
    sizes = torch.full((10,), 100)
    assert kept_of_classes(sizes, 50.0, seed=0).tolist() != kept_of_classes(sizes, 50.0, seed=1).tolist()


def test_labels_stay_as_wrong_as_they_are_whatever_epoch_and_seed_of_the_run() -> None:
    plain, data = Digits(batch_size=50), NoisyLabels(Digits(batch_size=50), 0.4)
    first = labels_of(data)
    data.seed = 7
    second = labels_of(data, epoch=3)
    shared = first.keys() & second.keys()
    assert len(shared) > 1000
    assert all(first[index] == second[index] for index in shared)
    right = labels_of(plain)
    assert 0.3 < sum(first[i] != right[i] for i in first.keys() & right.keys()) / len(first) < 0.42


def test_plain_training_images_are_those_of_the_damaged_set() -> None:
    noisy, rare = NoisyLabels(Digits(), 0.4), Imbalanced(Digits(), 10.0)
    seen = labels_of(noisy)
    plain: dict[int, int] = {}
    for batch in noisy.plain():
        plain |= dict(zip(batch.extra["index"].tolist(), batch.target.argmax(1).tolist(), strict=True))
    assert len(plain) == len(noisy.damaged.training.positions)
    assert seen.items() <= plain.items()
    assert sum(len(batch.input) for batch in rare.plain()) == len(rare.damaged.training.positions)


def test_order_and_images_are_those_of_the_data_set_itself() -> None:
    plain, data = Digits(batch_size=32), NoisyLabels(Digits(batch_size=32), 0.5)
    plain.seed = data.seed = 5
    for one, other in zip(plain.train(2, start=3), data.train(2, start=3), strict=True):
        assert torch.equal(one.input, other.input)
        assert torch.equal(one.extra["index"], other.extra["index"])


def test_what_is_measured_on_is_not_damaged_nor_the_data_set_that_was_given() -> None:
    given = Digits(batch_size=64)
    before = copy.deepcopy(given.training.source.labels)
    for data in (NoisyLabels(given, 1.0), Imbalanced(given, 20.0)):
        for loader in ("validation", "test"):
            expected = torch.cat([batch.target for batch in getattr(given, loader)()])
            assert torch.equal(torch.cat([batch.target for batch in getattr(data, loader)()]), expected)
        assert torch.equal(data.example(), given.example())
    assert torch.equal(given.training.source.labels, before)
    assert len(labels_of(given)) > 1000


def test_rare_classes_are_as_rare_as_asked() -> None:
    data = Imbalanced(Digits(batch_size=1), 20.0)
    counts = torch.bincount(torch.tensor(list(labels_of(data).values())), minlength=10).sort().values
    assert counts[-1] == 20 * counts[0] or abs(counts[-1] / counts[0] - 20) < 2
    assert counts[0] > 0


def test_a_damaged_set_may_be_damaged_again() -> None:
    twice = NoisyLabels(Imbalanced(Digits(batch_size=4), 10.0), 0.3)
    assert len(labels_of(twice)) == len(labels_of(Imbalanced(Digits(batch_size=4), 10.0)))


def test_it_can_be_written_down() -> None:
    again = build(describe(NoisyLabels(Digits(batch_size=16), 0.25, damage_seed=2)))
    assert isinstance(again, NoisyLabels)
    assert (again.rate, again.damage_seed, again.batch_size) == (0.25, 2, 16)


def test_labels_of_a_file_are_learned_from_and_others_measured_on(tmp_path: Path) -> None:
    plain = Digits(batch_size=50)
    count = len(plain.training.source.labels)
    given = (np.arange(count) % 10).astype(np.uint8)
    np.savez(tmp_path / "labels.npz", right=plain.training.source.labels, other=given)
    data = GivenLabels(Digits(batch_size=50), str(tmp_path / "labels.npz"), key="other")
    assert all(label == given[index] for index, label in labels_of(data).items())
    assert torch.equal(next(iter(data.validation())).target, next(iter(plain.validation())).target)
    again = build(describe(data))
    assert labels_of(again) == labels_of(data)
    twice = NoisyLabels(GivenLabels(Digits(), str(tmp_path / "labels.npz"), key="other"), rate=0.0)
    assert all(label == given[index] for index, label in labels_of(twice).items())


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    count = len(Digits().training.source.labels)
    files = {
        "short.npy": (np.zeros(7, dtype=int), r"short.npy holds 7 labels; this data set has \d+ images"),
        "high.npy": (np.full(count, 10), r"high.npy holds 10 to 10; classes are 0 to 9"),
        "shares.npy": (np.zeros((count, 10)), r"shares.npy holds float64 of shape .*; give one whole number an image"),
        "pickled.npy": (np.array([{}], dtype=object), r"pickled.npy is no NumPy file of numbers"),
    }
    for name, (content, message) in files.items():
        np.save(tmp_path / name, content, allow_pickle=True)
        with pytest.raises(UserError, match=message):
            GivenLabels(Digits(), str(tmp_path / name))
    np.savez(tmp_path / "two.npz", one=np.zeros(count), two=np.zeros(count))
    with pytest.raises(UserError, match=r"key is three; .*two.npz holds one, two"):
        GivenLabels(Digits(), str(tmp_path / "two.npz"), key="three")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut.npz is no NumPy file of numbers"):
        GivenLabels(Digits(), str(tmp_path / "cut.npz"), key="one")
    with pytest.raises(UserError, match=r"there is no file .*none.npy"):
        GivenLabels(Digits(), str(tmp_path / "none.npy"))


def test_impossible_damage_is_refused() -> None:
    with pytest.raises(UserError, match=r"rate is 1.5; give a share"):
        NoisyLabels(Digits(), 1.5)
    with pytest.raises(UserError, match=r"factor is 9000; the smallest class has \d+ images"):
        Imbalanced(Digits(), 9000)
