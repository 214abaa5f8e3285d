"""Labels refined by networks that did not see the image: who saw what, what comes out, and what stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.data import Normalize
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, identical, tiny_network
from galago.method import Method
from galago.models.tiny import tiny
from galago.quantize.ewgs import EWGS
from galago.quantize.lsq import LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.label_refinery import LabelRefinery, entropy, fold_numbers, fresh
from galago.run import Run
from galago.spec import describe
from galago.testing import check_method
from galago.train import train
from galago.trainer import finish


class Numbered(TinyImages):
    """Shuffled; the first pixel is the image's number; a batch's worth of images is left out of every epoch.

    Args:
        wrong: so many first images have another label than theirs.
    """

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.wrong = wrong
        self.normalize = Normalize([0.0] * 3, [1.0] * 3)

    def train(self, epoch: int = 0, start: int = 0) -> list[Batch]:
        whole = [torch.cat([batch[part] for batch in self._batches(0)]) for part in (0, 1)]
        order = torch.randperm(48, generator=torch.Generator().manual_seed(100 * self.seed + epoch))[:40]
        image, target = whole[0].clone(), whole[1].clone()
        image[:, 0, 0, 0] = torch.arange(48, dtype=torch.uint8)
        target[: self.wrong] = target[: self.wrong].roll(1, 1)
        return [Batch(image[part], target[part], {"index": part}) for part in order.view(5, 8)[start:]]


NOTES: list[tuple[set[int], set[int]]] = []  # of each network: what it learned from, what it was asked


class Noting(nn.Module):
    """Writes down which images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 3)
        self.notes: tuple[set[int], set[int]] = (set(), set())
        NOTES.append(self.notes)

    def forward(self, x: Tensor) -> Tensor:
        self.notes[0 if self.training else 1].update((255 * x[:, 0, 0, 0]).round().int().tolist())
        return self.head(x.flatten(1))


def refinery(epochs: int = 2, shares: tuple[float, ...] = (0.3,), folds: int = 3, free: bool = False) -> LabelRefinery:
    return LabelRefinery(epochs, list(shares), folds, free)


def refine(method: LabelRefinery, model: nn.Module, data: TinyImages) -> None:
    method.epoch(method.prepare(model, data), 0)


def trial(*methods: Method, data: TinyImages | None = None) -> Trial:
    return Trial(tiny_network, classify(), data or Numbered(), lambda: list(methods))


def test_folds_hold_equal_shares_of_each_class() -> None:
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 10)[torch.randperm(37)]
    numbers = fold_numbers(labels, 5, torch.Generator().manual_seed(3))
    for kind in range(3):
        counts = torch.bincount(numbers[labels == kind], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert torch.bincount(numbers).max() - torch.bincount(numbers).min() <= 1


def test_each_round_divides_anew() -> None:
    method, labels = refinery(folds=4), torch.eye(3)[torch.arange(30) % 3]
    first, second = method.divided(labels, 0, 0), method.divided(labels, 0, 1)
    assert not torch.equal(first, second)
    assert torch.equal(first, method.divided(labels, 0, 0))
    labels[4] = 0
    assert (method.divided(labels, 0, 0) < 0).nonzero().tolist() == [[4]]


def test_no_image_is_predicted_by_a_network_that_has_seen_it_in_that_round() -> None:
    model = Noting()
    NOTES.clear()
    refine(refinery(shares=(0.3, 0.4), folds=4), model, Numbered())
    assert len(NOTES) == 8
    for learned, asked in NOTES:
        assert learned
        assert asked
        assert not learned & asked
    for round_ in (NOTES[:4], NOTES[4:]):
        together = [number for _, asked in round_ for number in asked]
        assert len(together) == len(set(together)) >= 40
    assert not model.notes[0]
    assert not model.notes[1]


def test_targets_are_distributions_that_keep_their_label_and_are_not_certain() -> None:
    method = refinery(shares=(0.3, 0.45))
    started = trial(method)
    labels = method.labels(Numbered(), torch.device("cpu"))
    known = labels.sum(1) > 0
    assert method.kept.rows is not None
    assert 40 < known.sum() <= 48
    torch.testing.assert_close(method.kept.rows[known].sum(1), torch.ones(int(known.sum())))
    assert (method.kept.rows >= 0).all()
    assert torch.equal(method.kept.rows[known].argmax(1), labels[known].argmax(1))
    assert entropy(method.kept.rows[known]).mean() > 0
    assert not method.kept.rows[~known].any()
    found = started.step(0).batch
    assert torch.equal(found.target, method.kept.rows[found.extra["index"]])


def test_free_targets_of_wrongly_labeled_images_move_towards_the_right_class() -> None:
    data, right = Numbered(wrong=8), Numbered()
    method = LabelRefinery(epochs=12, shares=[0.4, 0.4], folds=3, free=True)
    refine(method, tiny_network(), data)
    assert method.kept.rows is not None
    truth = method.labels(right, torch.device("cpu"))[:8]
    given = method.labels(data, torch.device("cpu"))[:8]
    known = truth.sum(1) > 0
    before, after = ((part * truth)[known].sum(1).mean() for part in (given, method.kept.rows[:8]))
    assert before == 0
    assert after > 0.4
    doubtful, sure = entropy(method.kept.rows[:8][known]).mean(), entropy(method.kept.rows[8:]).mean()
    assert doubtful > sure


def test_without_a_share_training_is_bit_for_bit_that_with_labels() -> None:
    states = []
    for methods in ([refinery(shares=(0.0, 0.0))], []):
        started = trial(*methods)
        for number in range(3):
            started.step(number)
        states.append((clone(started.learner.model.state_dict()), torch.get_rng_state()))
    assert identical(*states)


def test_it_refines_to_the_same_numbers_and_another_seed_to_others() -> None:
    found = []
    for seed in (0, 0, 1):
        data, method = Numbered(), refinery()
        data.seed = seed
        refine(method, tiny_network(), data)
        found.append(method.kept.rows)
    assert identical(found[0], found[1])
    assert not identical(found[0], found[2])


def test_a_fresh_network_is_the_one_that_the_model_was_before_methods_changed_it() -> None:
    model = trial(Quantize(LSQWeight(4), EWGS(4))).learner.model
    network = fresh(model)
    assert network.state_dict().keys() == tiny_network().state_dict().keys()
    assert not torch.equal(network.get_parameter("head.weight"), tiny_network().get_parameter("head.weight"))


@pytest.mark.parametrize("other", [CutMix(probability=1.0), Quantize(LSQWeight(4), EWGS(4))], ids=str)
def test_it_trains_with_mixing_and_with_quantizers_and_exports(other: Method) -> None:
    started = trial(refinery(epochs=1), other)
    for number in range(2):
        step = started.step(number)
        assert step.loss.isfinite()
    torch.testing.assert_close(step.batch.target.sum(1), torch.ones(8))
    assert exported(finish(started.learner), started.image()).isfinite().all()


def test_a_run_that_goes_on_does_not_refine_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(LabelRefinery, "predicted", lambda self, *rest: asked.append(1) or torch.zeros(48, 3))

    def run(epochs: int) -> None:
        model = tiny(3, 3, 4)
        same = {"model": describe(model)}  # as a run that was stopped has, whatever its epochs
        with monkeypatch.context() as patch:
            patch.setattr(Run, "finished", property(lambda self: False))
            train(model, classify(), Numbered(), tmp_path, epochs, [refinery()], accelerator="cpu", recipe=same)

    run(1)
    run(2)
    assert asked == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"folds": 1}, "folds 1"), ({"epochs": 0}, "epochs 0"), ({"shares": [1.2]}, "from 0 to 1")],
)
def test_impossible_settings_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LabelRefinery(**arguments)  # type: ignore[arg-type]


def test_nothing_is_trained_before_a_person_has_read_what_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    method = refinery(shares=(0.3, 0.4), folds=4)
    method.prepare(tiny_network(), Numbered())
    assert method.kept.rows is None
    assert not capsys.readouterr().err
    assert method.summary() == "LabelRefinery: 8 trainings of 2 epochs come before the first epoch"


def test_it_obeys_the_laws() -> None:
    check_method(lambda: LabelRefinery(epochs=1, shares=[0.3], folds=2, views=1))
