"""Margin-based label smoothing against the released code's numbers and a loop over scores."""

from __future__ import annotations

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
from galago.regularize.margin import MarginSmoothing, excess
from galago.testing import check_method
from galago.trainer import finish
from scored import GOLDEN, TARGET, golden, scores, step


@pytest.mark.parametrize("margin", [6, 1])
def test_loss_and_gradient_equal_the_golden_values(margin: int) -> None:
    output, name = scores(), f"loss_mbls_margin{margin}_weight0.1"
    loss = nn.functional.cross_entropy(output, TARGET) + 0.1 * excess(output, margin)
    torch.testing.assert_close(loss, golden(name), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, golden(f"{name}_grad"), rtol=0, atol=1e-12)


def test_the_method_adds_it_to_the_cross_entropy() -> None:
    losses = step(MarginSmoothing(1.0), golden("loss_logits"), TARGET)
    assert float(sum(losses.values())) == pytest.approx(float(GOLDEN["loss_mbls_margin1_weight0.1"]), abs=1e-6)


def test_it_agrees_with_a_loop_over_scores() -> None:
    output = golden("loss_logits")
    total = sum(max(0.0, float(row.max() - score) - 1.5) for row in output for score in row)
    assert float(excess(output, 1.5)) == pytest.approx(total / output.numel())


def test_scores_within_the_margin_cost_nothing_and_a_common_shift_changes_nothing() -> None:
    output = torch.tensor([[3.0, -3.0, 0.0]])
    assert float(excess(output, 6.0)) == 0
    assert float(excess(output + 100, 5.0)) == pytest.approx(1 / 3)


def test_what_may_be_said_for_nothing_is_bounded_as_the_page_says() -> None:
    output = torch.tensor([[6.0] + [0.0] * 9])
    assert float(excess(output, 6.0)) == 0
    assert float(output.softmax(1).max()) == pytest.approx(0.978, abs=5e-4)


def test_the_largest_score_is_pulled_down_by_as_much_as_the_others_are_pulled_up() -> None:
    output = torch.tensor([[9.0, 0.0, 0.0, 8.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(excess(output, 2.0), output)
    assert gradient.tolist() == [[0.5, -0.25, -0.25, 0.0]]


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(UserError, match="margin is -1"):
        MarginSmoothing(-1.0)


def test_a_quantized_network_trains_with_it_on_mixed_images_and_exports() -> None:
    methods: list[Method] = [
        CutMix(probability=1.0),
        MarginSmoothing(),
        Quantize(LSQWeight(4), EWGS(4), stream=MinMax(8)),
    ]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods)
    for number in range(2):
        assert trial.step(number).losses["margin"].isfinite()
    finished = finish(trial.learner).eval()
    with torch.no_grad():
        assert close(finished(trial.image()), exported(finished, trial.image()))


def test_it_obeys_the_laws() -> None:
    check_method(MarginSmoothing)
