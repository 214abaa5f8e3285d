"""Stochastic depth: branches are there or not, as often as they should be, and are all there in the end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, close, exported, identical, tiny_network
from galago.method import Method
from galago.models.resnet import resnet20
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.residual import Branch
from galago.regularize.stochastic_depth import DroppedBranch, StochasticDepth, gates
from galago.testing import check_method
from galago.trainer import finish
from samples import SmallNet


@pytest.mark.parametrize("per_image", [False, True])
def test_a_branch_is_there_as_often_as_its_survival_says(per_image: bool) -> None:
    drawn = torch.stack([gates(torch.ones(4, 2, 3, 3), 0.7, per_image) for _ in range(1500)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(drawn.mean() - 0.7) < 0.03
    assert drawn.shape == ((1500, 4, 1, 1, 1) if per_image else (1500,))


@pytest.mark.parametrize(("survival", "factor"), [(0.0, 0.0), (1.0, 1.0)])
def test_a_branch_that_never_or_always_survives(survival: float, factor: float) -> None:
    y = torch.randn(2, 3, 4, 4)
    assert torch.equal(DroppedBranch(nn.Identity(), survival).train()(y), factor * y)
    assert torch.equal(DroppedBranch(nn.Identity(), survival).eval()(y), factor * y)


def test_a_network_without_its_branch_is_the_shortcut_and_the_branch_learns_nothing() -> None:
    model = StochasticDepth(0.0).prepare(SmallNet(), TinyImages()).train()
    image = torch.randn(4, 3, 8, 8)
    stem: Tensor = model.relu1(model.bn1(model.conv1(image)))
    wanted = model.fc(model.pool(model.relu2(stem)).flatten(1))
    found = model(image)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert not model.conv2.weight.grad.any()
    assert model.conv1.weight.grad.any()


def test_each_image_may_have_its_own_depth() -> None:
    model = StochasticDepth(0.5, per_image=True).prepare(SmallNet(), TinyImages()).train()
    same = torch.randn(1, 3, 8, 8).expand(64, -1, -1, -1)
    answers = {tuple(row) for row in model(same).detach().double().round(decimals=4).tolist()}
    assert len(answers) == 2


def test_it_obeys_the_laws() -> None:
    check_method(StochasticDepth)
    check_method(lambda: StochasticDepth(0.8, per_image=True))


def test_a_network_that_always_survives_is_trained_exactly_as_without_it() -> None:
    trained = []
    for methods in ([StochasticDepth(1.0)], []):
        trial = Trial(tiny_network, classify(), TinyImages(), lambda methods=methods: methods)
        for number in range(3):
            trial.step(number)
        trained.append(finish(trial.learner).state_dict())
    assert identical(*trained)


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), edge_input=MinMax(8), stream=MinMax(8))


@pytest.mark.parametrize("first", [lambda: [CutMix()], lambda: [quantize()]])
def test_it_trains_finishes_and_exports_behind_others(first) -> None:
    def methods() -> list[Method]:
        return [*first(), StochasticDepth()]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    before = clone(trial.learner.model.eval()(trial.image()))
    finished = finish(trial.learner)
    assert not any(isinstance(part, Branch) for part in finished.modules())
    assert close(before, finished(trial.image()), 0.05)
    assert close(finished(trial.image()), exported(finished, trial.image()))


def test_quantizers_behind_it_are_refused_before_the_first_step() -> None:
    with pytest.raises(UserError, match="StochasticDepth is listed before Quantize"):
        Trial(tiny_network, classify(), TinyImages(), lambda: [StochasticDepth(), quantize()])


def test_summary_says_which_branch_is_there_how_often() -> None:
    method = StochasticDepth(0.1)
    method.prepare(resnet20(), TinyImages())
    assert str(method.summary()).endswith("layer3.2.bn2 0.1")


def test_a_survival_that_is_no_probability_is_refused() -> None:
    with pytest.raises(UserError, match="StochasticDepth: last_survival is 2"):
        StochasticDepth(2.0)
