"""The confidence penalty against the released code's numbers, a loop, and what must be so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from galago.augment.cutmix import CutMix
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, close, exported, tiny_network
from galago.method import Method
from galago.quantize.ewgs import EWGS
from galago.quantize.lsq import LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.confidence_penalty import ConfidencePenalty, mean_entropy
from galago.testing import check_method
from galago.trainer import finish
from scored import GOLDEN, TARGET, golden, scores, step


def test_loss_and_gradient_equal_the_golden_values_of_the_code_that_averages_over_classes_too() -> None:
    output = scores()
    loss = nn.functional.cross_entropy(output, TARGET) - 0.1 / 6 * mean_entropy(output)
    torch.testing.assert_close(loss, golden("loss_confidence_penalty0.1"), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, golden("loss_confidence_penalty0.1_grad"), rtol=0, atol=1e-12)


def test_the_method_adds_it_to_the_cross_entropy_in_the_convention_of_the_paper() -> None:
    losses = step(ConfidencePenalty(0.1 / 6), golden("loss_logits"), TARGET)
    assert float(sum(losses.values())) == pytest.approx(float(GOLDEN["loss_confidence_penalty0.1"]), abs=1e-6)


def test_it_agrees_with_a_loop_and_with_the_value_of_the_card() -> None:
    p = golden("loss_logits").softmax(1)
    total = -sum(float(value * value.log()) for value in p.flatten())
    assert float(mean_entropy(golden("loss_logits"))) == pytest.approx(total / 16)
    assert float(mean_entropy(torch.tensor([[2.0, 1, 0], [0, 1, 3]]).double())) == pytest.approx(0.678331099, abs=1e-9)


def test_it_is_lowest_where_nothing_is_said_and_zero_where_all_is() -> None:
    assert float(step(ConfidencePenalty(1.0), torch.zeros(2, 4), torch.eye(4)[:2])["confidence_penalty"]) == (
        pytest.approx(-np.log(4))
    )
    output = (1e4 * torch.eye(4)).requires_grad_()
    loss = step(ConfidencePenalty(1.0), output, torch.eye(4))["confidence_penalty"]
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, output)
    assert gradient.isfinite().all()


def test_a_sure_answer_is_pulled_towards_the_others() -> None:
    output = torch.tensor([[4.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(step(ConfidencePenalty(), output, torch.eye(3)[:1])["confidence_penalty"], output)
    assert gradient[0, 0] > 0 > gradient[0, 1]


def test_a_quantized_network_trains_with_it_on_mixed_images_and_exports() -> None:
    methods: list[Method] = [
        CutMix(probability=1.0),
        ConfidencePenalty(),
        Quantize(LSQWeight(4), EWGS(4), stream=MinMax(8)),
    ]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods)
    for number in range(2):
        assert trial.step(number).losses["confidence_penalty"].isfinite()
    finished = finish(trial.learner).eval()
    with torch.no_grad():
        assert close(finished(trial.image()), exported(finished, trial.image()))


def test_it_obeys_the_laws() -> None:
    check_method(ConfidencePenalty)


def test_the_value_of_the_study_is_reproduced() -> None:
    study = np.load(Path(__file__).parents[1] / "golden/regularization/reg_robustness_eval.npz")
    output, label = torch.from_numpy(study["logits"]), torch.from_numpy(study["labels"]).long()
    target = nn.functional.one_hot(label, output.shape[1]).double()
    losses = step(ConfidencePenalty(0.1), output, target)
    assert float(sum(losses.values())) == pytest.approx(float(study["confidence_penalty_loss_beta0_1"]), rel=1e-6)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UserError, match="give 0 or more"):
        ConfidencePenalty(-0.1)
