"""Confidence penalty: the card's number, its optimum, and that it composes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch, Step
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, close, exported, tiny_network
from galago.method import Forward, Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.confidence_penalty import ConfidencePenalty, mean_entropy
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "reg_robustness_eval.npz")


def penalized(scores: torch.Tensor, labels: torch.Tensor, weight: float) -> Step:
    batch = Batch(scores, nn.functional.one_hot(labels.long(), scores.shape[1]).to(scores.dtype))
    return ConfidencePenalty(weight).step(batch, Forward(nn.Identity(), Classify(scores.shape[1])))


def test_the_loss_is_the_cards() -> None:
    scores, labels = (torch.from_numpy(np.asarray(GOLDEN[name])) for name in ("logits", "labels"))
    losses = penalized(scores, labels, 0.1).losses
    wanted = float(GOLDEN["confidence_penalty_loss_beta0_1"])
    assert sum(losses.values()).item() == pytest.approx(wanted, rel=1e-9)


def test_the_entropy_is_that_of_torch_and_finite_where_the_network_is_certain() -> None:
    scores = torch.randn(7, 4)
    torch.testing.assert_close(mean_entropy(scores), torch.distributions.Categorical(logits=scores).entropy().mean())
    certain = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    assert mean_entropy(certain).item() == 0.0
    assert torch.autograd.grad(mean_entropy(certain), certain)[0].isfinite().all()
    assert mean_entropy(torch.zeros(2, 4)).item() == pytest.approx(math.log(4))


def test_the_least_loss_is_at_finite_scores() -> None:
    margins = torch.linspace(0, 30, 3001)
    losses = [penalized(torch.tensor([[m, 0.0]]), torch.tensor([0]), 0.2).loss.item() for m in margins.tolist()]
    assert 0.5 < margins[int(torch.tensor(losses).argmin())] < 15


def test_it_obeys_the_laws() -> None:
    check_method(ConfidencePenalty)


@pytest.mark.parametrize("quantized", [True, False])
def test_it_trains_finishes_and_exports_with_others(quantized: bool) -> None:
    def methods() -> list[Method]:
        first = Quantize(LSQWeight(4), LSQ(4), edge_input=MinMax(8), stream=MinMax(8)) if quantized else CutMix()
        return [first, ConfidencePenalty()]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).losses.keys() == {"cross_entropy", "confidence_penalty"}
    finished = finish(trial.learner)
    assert close(finished(trial.image()), exported(finished, trial.image()))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UserError, match="weight is -1"):
        ConfidencePenalty(-1.0)
