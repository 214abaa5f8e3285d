"""MDCA against the released code's numbers, a loop over classes, and what must be so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.augment.cutmix import CutMix
from galago.laws.trial import TinyImages, Trial, classify, close, exported, tiny_network
from galago.method import Method
from galago.quantize.ewgs import EWGS
from galago.quantize.lsq import LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.mdca import MDCA, class_gap
from galago.testing import check_method
from galago.trainer import finish
from scored import GOLDEN, TARGET, golden, scores, step


def test_loss_and_gradient_equal_the_golden_values() -> None:
    output = scores()
    term = class_gap(output.softmax(1), TARGET)
    torch.testing.assert_close(term, golden("mdca_term"), rtol=0, atol=1e-12)
    loss = nn.functional.cross_entropy(output, TARGET) + term
    torch.testing.assert_close(loss, golden("loss_mdca_ce_on_logits"), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, golden("loss_mdca_ce_on_logits_grad"), rtol=0, atol=1e-12)


def test_the_released_code_takes_the_softmax_twice_and_smooths_labels_and_this_does_not() -> None:
    twice = nn.functional.cross_entropy(golden("loss_logits").softmax(1), TARGET, label_smoothing=0.1)
    torch.testing.assert_close(twice + golden("mdca_term"), golden("mdca_double_softmax_compat"), rtol=0, atol=1e-12)


def test_the_method_adds_it_to_the_cross_entropy() -> None:
    losses = step(MDCA(), golden("loss_logits"), TARGET)
    assert float(sum(losses.values())) == pytest.approx(float(GOLDEN["loss_mdca_ce_on_logits"]), abs=1e-6)
    assert float(step(MDCA(3.0), golden("loss_logits"), TARGET)["mdca"]) == pytest.approx(3 * float(losses["mdca"]))


def test_it_agrees_with_a_loop_over_classes() -> None:
    p = golden("loss_logits").softmax(1)
    total = sum(abs(sum(float(p[b, k] - TARGET[b, k]) for b in range(16)) / 16) for k in range(6))
    assert float(class_gap(p, TARGET)) == pytest.approx(total / 6)


def test_predicting_how_often_each_class_is_there_costs_nothing() -> None:
    target = torch.eye(3)[[0, 0, 1, 2]]
    assert float(class_gap(torch.tensor([[0.5, 0.25, 0.25]] * 4), target)) == 0
    assert float(class_gap(target.flip(0), target)) == 0


def test_mixed_targets_count_for_each_class_by_their_share() -> None:
    mixed = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
    assert float(step(MDCA(), mixed.log(), mixed)["mdca"]) == pytest.approx(0, abs=1e-7)


def test_a_quantized_network_trains_with_it_on_mixed_images_and_exports() -> None:
    methods: list[Method] = [CutMix(probability=1.0), MDCA(), Quantize(LSQWeight(4), EWGS(4), stream=MinMax(8))]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods)
    for number in range(2):
        assert trial.step(number).losses["mdca"].isfinite()
    finished = finish(trial.learner).eval()
    with torch.no_grad():
        assert close(finished(trial.image()), exported(finished, trial.image()))


def test_it_obeys_the_laws() -> None:
    check_method(MDCA)
