"""SWA: which weights are averaged, what ships, and that an interruption changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from galago.augment.cutmix import CutMix
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, close, exported, identical, tiny_network
from galago.method import Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.shake_drop import ShakeDrop
from galago.regularize.weight_averaging import WeightAveraging, joined
from galago.run import load
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from galago.trainer import finish
from samples import SmallNet, StopAt, Stopped, Stripes


class Notes(Method):
    """Keeps the weights at the start of each epoch, and the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, torch.Tensor]] = []

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        self.seen.append(clone(dict(model.named_parameters())))
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        self.seen.append(clone(dict(model.named_parameters())))
        return model


def test_joining_one_after_another_gives_the_mean() -> None:
    given = torch.randn(6, 4, dtype=torch.float64)
    mean = torch.zeros(4, dtype=torch.float64)
    for count, weight in enumerate(given):
        mean = joined(mean, weight, count)
    torch.testing.assert_close(mean, given.mean(0))


@pytest.mark.parametrize(
    ("start", "epochs", "averaged"),
    [(0.75, 4, [3, 4]), (0.5, 4, [2, 3, 4]), (0.0, 2, [0, 1, 2]), (0.4, 5, [2, 3, 4, 5])],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_ships_is_the_mean_of_the_ends_of_the_last_epochs(
    start: float, epochs: int, averaged: list[int], accumulate: int, tmp_path: Path
) -> None:
    notes = Notes()
    methods = [WeightAveraging(start), notes]
    shipped = train(SmallNet(), Classify(2), Stripes(), tmp_path, epochs, methods, accumulate=accumulate)
    for name, weight in shipped.named_parameters():
        torch.testing.assert_close(weight, torch.stack([notes.seen[e][name] for e in averaged]).mean(0), msg=name)
    read = load(tmp_path, ["samples"])
    assert identical(dict(read.named_parameters()), dict(shipped.named_parameters()))


def test_the_statistics_that_ship_are_those_of_the_mean_weights(tmp_path: Path) -> None:
    data = Stripes()
    model = train(SmallNet(), Classify(2), data, tmp_path, 4, [WeightAveraging(0.5)])
    with torch.no_grad():
        given = [model.conv1(data.normalize(batch.input)) for batch in data.train()]
    means = torch.stack([one.mean((0, 2, 3)) for one in given]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, means, rtol=1e-5, atol=1e-5)


def test_training_itself_is_exactly_that_without_it() -> None:
    trained = []
    for methods in ([WeightAveraging(0.0)], []):
        trial = Trial(tiny_network, classify(), TinyImages(), lambda methods=methods: methods)
        for number in range(3):
            trial.step(number)
        trained.append(trial.learner.model.state_dict())
    assert identical(*trained)


@pytest.mark.parametrize("at", [5, 8, 11])
def test_interrupted_and_resumed_it_ships_the_same_weights(at: int, tmp_path: Path) -> None:
    shipped = []
    for stop in (0, at):
        StopAt.at = stop
        arguments = {"epochs": 4, "checkpoint_every": 1}
        for _ in range(2 if stop else 1):
            torch.manual_seed(0)
            methods = [StopAt(), WeightAveraging(0.5)]
            try:
                model = train(SmallNet(), Classify(2), Stripes(), tmp_path / str(stop), methods=methods, **arguments)
            except Stopped:
                StopAt.at = 0
        shipped.append(clone(model.state_dict()))
    assert identical(*shipped)


def test_a_training_too_short_for_it_ships_the_last_weights_and_says_so(tmp_path: Path, capsys) -> None:
    trained = []
    for methods in ([WeightAveraging(0.75)], []):
        torch.manual_seed(0)
        trained.append(train(SmallNet(), Classify(2), Stripes(), tmp_path / str(len(methods)), 2, methods).state_dict())
    assert identical(*trained)
    assert "no epoch began after 0.75 of the training; the last weights ship" in capsys.readouterr().err


def test_a_network_of_another_shape_is_averaged_anew() -> None:
    method = WeightAveraging()
    method.take(nn.Linear(4, 4))
    method.take(other := nn.Linear(3, 4))
    assert method._count == 1
    assert torch.equal(method._mean["weight"], other.weight)


def test_a_network_without_batchnorm_is_averaged_too() -> None:
    method, model = WeightAveraging(), nn.Linear(2, 2, bias=False)
    method.prepare(model, TinyImages())
    with torch.no_grad():
        method.take(model)
        first = model.weight.clone()
        model.weight.add_(2)
    torch.testing.assert_close(method.finish(model).weight, first + 1)


def test_it_obeys_the_laws() -> None:
    check_method(WeightAveraging)
    check_method(lambda: WeightAveraging(0.0, batches=2), same_answer=False)


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), edge_input=MinMax(8), stream=MinMax(8))


@pytest.mark.parametrize("first", [lambda: [CutMix()], lambda: [quantize()], lambda: [quantize(), ShakeDrop()]])
def test_it_trains_finishes_and_exports_behind_others(first) -> None:
    def methods() -> list[Method]:
        return [*first(), WeightAveraging(0.0, batches=2)]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    before = copy.deepcopy(trial.learner.model.state_dict())
    finished = finish(trial.learner)
    assert not identical(before, finished.state_dict())
    assert close(finished(trial.image()), exported(finished, trial.image()))


def test_a_method_behind_it_that_changes_the_network_is_refused_before_the_first_step() -> None:
    with pytest.raises(UserError, match="list WeightAveraging last"):
        Trial(tiny_network, classify(), TinyImages(), lambda: [WeightAveraging(), quantize()])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"start": 1.0}, "start is 1"), ({"start": -0.1}, "start"), ({"batches": 0}, "batches is 0")],
)
def test_numbers_that_mean_nothing_are_refused(arguments, said: str) -> None:
    with pytest.raises(UserError, match=said):
        WeightAveraging(**arguments)
