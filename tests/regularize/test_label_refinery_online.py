"""Targets refined while the network trains: what is set aside, what moves, what trains."""

from __future__ import annotations

import pytest
import torch

from galago.augment.cutmix import CutMix
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, tiny_network
from galago.method import Forward, Method
from galago.quantize.ewgs import EWGS
from galago.quantize.lsq import LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.label_refinery_online import OnlineLabelRefinery
from galago.testing import check_method
from galago.trainer import finish


def trial(*methods: Method) -> Trial:
    return Trial(tiny_network, classify(), TinyImages(), lambda: list(methods))


@pytest.mark.parametrize("free", [False, True])
def test_what_is_set_aside_does_not_train_and_moves_towards_what_the_network_says(free: bool) -> None:
    method = OnlineLabelRefinery(share=0.3, folds=4, free=free, temperature=2.0)
    started = trial(method)
    data, net, batch = started.data, started.learner.model.train(), started.batches[0]
    batch = batch._replace(input=data.normalize(batch.input))
    expected = 0.7 * batch.target[:2] + 0.3 * (net.eval()(batch.input[:2]) / 2).softmax(1)
    net.train()
    step = method.step(batch, Forward(net, classify(), progress=0.5))
    assert step.batch.extra["index"].tolist() == [2, 3, 4, 5, 6, 7]
    assert net.training
    assert method.kept.rows is not None
    torch.testing.assert_close(method.kept.rows[:2], expected)
    assert not method.kept.rows[2:].any()
    again = 0.3 * (net.eval()(batch.input[:2]) / 2).softmax(1) + 0.7 * (expected if free else batch.target[:2])
    method.step(batch, Forward(net.train(), classify(), progress=0.5))
    torch.testing.assert_close(method.kept.rows[:2], again, atol=0.02, rtol=0)  # BatchNorm has seen a batch


def test_before_its_start_training_is_that_with_labels() -> None:
    states = []
    for methods in ([OnlineLabelRefinery(start=1.0)], []):
        started = trial(*methods)
        for number in range(2):
            started.step(number)
        states.append(started.learner.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_targets_stay_distributions_that_keep_their_label() -> None:
    method = OnlineLabelRefinery(start=0.0)
    started = trial(method)
    for number in range(12):
        started.step(number % 6)
    assert method.kept.rows is not None
    known = method.kept.rows.sum(1) > 0
    assert known.sum() == 6  # the first of each batch, which these data do not shuffle
    torch.testing.assert_close(method.kept.rows[known].sum(1), torch.ones(6))
    assert (method.kept.rows >= 0).all()
    assert torch.equal(method.kept.rows[known].argmax(1), (torch.arange(48) % 3)[known])


@pytest.mark.parametrize("other", [CutMix(probability=1.0), Quantize(LSQWeight(4), EWGS(4))], ids=str)
def test_it_trains_with_mixing_and_with_quantizers_and_exports(other: Method) -> None:
    started = trial(OnlineLabelRefinery(start=0.0), other)
    for number in range(2):
        assert started.step(number).loss.isfinite()
    assert exported(finish(started.learner), started.image()).isfinite().all()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"share is 1\.5"):
        OnlineLabelRefinery(share=1.5)
    with pytest.raises(UserError, match="folds is 1"):
        OnlineLabelRefinery(folds=1)


def test_it_obeys_the_laws() -> None:
    check_method(lambda: OnlineLabelRefinery(start=0.0))
