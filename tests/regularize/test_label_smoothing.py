import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.method import Forward
from galago.mixing import mix_targets
from galago.regularize.label_smoothing import LabelSmoothing, smooth
from galago.tasks.classify import Classify
from galago.testing import check_method

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "reg_robustness_eval.npz")


def smoothed_step(batch: Batch, epsilon: float) -> Step:
    return LabelSmoothing(epsilon).step(batch, Forward(nn.Identity(), Classify(3)))


def test_loss_is_the_reliability_cards_number() -> None:
    batch = Batch(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), torch.eye(3)[:2])
    assert smoothed_step(batch, 0.1).loss.item() == pytest.approx(1.322059325, abs=1e-6)


def test_targets_and_loss_are_those_of_the_study() -> None:
    scores, labels = (torch.from_numpy(np.asarray(GOLDEN[name])) for name in ("logits", "labels"))
    batch = Batch(scores, nn.functional.one_hot(labels.long(), 5).double())
    step = LabelSmoothing(0.1).step(batch, Forward(nn.Identity(), Classify(5)))
    wanted = torch.from_numpy(GOLDEN["label_smoothing_targets_eps0_1"])
    torch.testing.assert_close(step.batch.target, wanted, rtol=1e-9, atol=1e-12)
    assert step.losses["cross_entropy"].item() == pytest.approx(float(GOLDEN["label_smoothing_loss"]), rel=1e-9)


def test_loss_is_that_of_torchs_own_label_smoothing() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(10, 3), torch.randint(3, (10,))
    found = smoothed_step(Batch(scores, torch.eye(3)[labels]), 0.2).loss
    torch.testing.assert_close(found, nn.functional.cross_entropy(scores, labels, label_smoothing=0.2))


def test_least_loss_is_at_finite_scores() -> None:
    best = math.log((1 - 0.3 + 0.3 / 3) / (0.3 / 3))  # the margin at which softmax equals the smoothed target
    target = smooth(torch.eye(3)[:1], 0.3)
    margins = torch.linspace(0, 10, 1001)
    losses = [nn.functional.cross_entropy(torch.tensor([[m, 0.0, 0.0]]), target).item() for m in margins.tolist()]
    assert margins[int(torch.tensor(losses).argmin())].item() == pytest.approx(best, abs=0.02)


def test_smoothing_before_or_after_mixing_is_the_same() -> None:
    partners, kept = torch.tensor([2, 0, 1]), torch.tensor([0.3])
    torch.testing.assert_close(
        smooth(mix_targets(torch.eye(3), partners, kept), 0.1), mix_targets(smooth(torch.eye(3), 0.1), partners, kept)
    )


def test_the_given_target_is_left_alone_and_zero_changes_nothing() -> None:
    batch = Batch(torch.zeros(3, 3), torch.eye(3))
    step = smoothed_step(batch, 0.0)
    assert torch.equal(step.batch.target, torch.eye(3))
    smoothed_step(batch, 0.5)
    assert torch.equal(batch.target, torch.eye(3))


@pytest.mark.parametrize("epsilon", [-0.1, 1.1])
def test_an_impossible_share_is_refused(epsilon: float) -> None:
    with pytest.raises(UserError, match="epsilon"):
        LabelSmoothing(epsilon)


def test_targets_that_are_not_probabilities_are_refused() -> None:
    with pytest.raises(UserError, match="class probabilities"):
        smoothed_step(Batch(torch.zeros(2, 3), torch.tensor([0, 1])), 0.1)


def test_it_obeys_the_laws() -> None:
    check_method(LabelSmoothing)
