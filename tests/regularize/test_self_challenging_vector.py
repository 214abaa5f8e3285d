"""RSC on vectors against DomainBed's numbers, and what must be true of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, tiny_network
from galago.method import Forward, Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.muting import class_gradient, lost_probability
from galago.regularize.self_challenging_vector import VectorSelfChallenging, challenge, without_top
from galago.testing import check_method
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "rsc.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[f"vector_{name}"]))


def head(feature: Tensor) -> Tensor:
    return nn.functional.linear((feature @ golden("head_hidden")).tanh(), golden("head_weight"), golden("head_bias"))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_every_step_is_that_of_the_benchmark() -> None:
    feature = golden("features").requires_grad_()
    target = nn.functional.one_hot(golden("labels"), 4).double()
    gradient = class_gradient(feature, target, head)
    close(gradient, golden("gradient"))
    mask = without_top(gradient, float(golden("feature_fraction")))
    close(lost_probability(feature.detach(), mask, target, head), golden("delta"))
    whole = challenge(feature, target, head, float(golden("feature_fraction")), float(golden("batch_fraction")))
    assert torch.equal(whole, golden("mask"))
    loss = nn.functional.cross_entropy(head(feature * whole), target)
    loss.backward()
    close(loss.detach(), golden("loss"))
    close(feature.grad, golden("grad_features"))


def test_the_shares_of_entries_and_images_are_muted() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 12)
    target = torch.eye(3)[torch.arange(9) % 3]
    mask = challenge(torch.rand(9, 12), target, lambda f: f @ weight.T, 1 / 4, 1 / 3)
    muted = (mask == 0).sum(1)
    assert sorted(set(muted.tolist())) == [0, 3]
    assert (muted > 0).sum() == 3


@pytest.mark.parametrize("make_other", [lambda: Quantize(LSQWeight(4), LSQ(4)), CutMix])
@pytest.mark.parametrize("first", [True, False])
def test_it_trains_and_exports_beside_other_methods_and_leaves_nothing(make_other, first: bool) -> None:
    def methods() -> list[Method]:
        both = [VectorSelfChallenging(), make_other()]
        return both if first else both[::-1]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    model = finish(trial.learner)
    assert exported(model, trial.image()).isfinite().all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_answers_change_while_training_alone() -> None:
    method, model, data = VectorSelfChallenging(), tiny_network(), TinyImages()
    method.prepare(model, data)
    batch = data.train()[0]
    batch = batch._replace(input=data.normalize(batch.input))
    forward = Forward(model, classify(), [method])
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(forward(batch).output, model(batch.input)) != mode


def test_senseless_arguments_and_networks_are_refused() -> None:
    with pytest.raises(UserError, match="share is 0"):
        VectorSelfChallenging(share=0)
    with pytest.raises(UserError, match="no linear layer"):
        VectorSelfChallenging().prepare(nn.Conv2d(1, 1, 1), TinyImages())
    method, model = VectorSelfChallenging(), nn.Sequential(nn.Linear(4, 3), nn.Flatten())
    method.prepare(model, TinyImages())
    with pytest.raises(UserError, match="takes in 2×2×4 for 2 images"):
        method.step(Batch(torch.zeros(2, 2, 4), torch.eye(3)[:2]), Forward(model.train(), classify()))


def test_the_laws_of_methods_hold() -> None:
    check_method(VectorSelfChallenging)
