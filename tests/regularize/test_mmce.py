"""MMCE against the released code's numbers, a loop over pairs, and what must be so."""

from __future__ import annotations

import numpy as np
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
from galago.regularize.mmce import MMCE, kernel_error
from galago.testing import check_method
from galago.trainer import finish
from scored import GOLDEN, TARGET, golden, step


def test_loss_and_gradient_equal_the_golden_values() -> None:
    output = golden("loss_logits").clone().requires_grad_()
    confidence, predicted = output.softmax(1).max(1)
    loss = nn.functional.cross_entropy(output, TARGET) + kernel_error(
        confidence, (predicted == golden("loss_labels")).double()
    )
    torch.testing.assert_close(loss, golden("loss_mmce_lambda1"), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, golden("loss_mmce_lambda1_grad"), rtol=0, atol=1e-12)


def test_the_method_adds_it_to_the_cross_entropy() -> None:
    losses = step(MMCE(), golden("loss_logits"), TARGET)
    assert float(sum(losses.values())) == pytest.approx(float(GOLDEN["loss_mmce_lambda1"]), abs=1e-6)
    assert float(step(MMCE(0.25), golden("loss_logits"), TARGET)["mmce"]) == pytest.approx(float(losses["mmce"]) / 4)


def test_it_agrees_with_a_loop_over_pairs_and_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(12, generator=generator, dtype=torch.float64)
    correct = (torch.rand(12, generator=generator) < 0.5).double()
    total = 0.0
    for i in range(12):
        for j in range(12):
            gaps = float((correct[i] - confidence[i]) * (correct[j] - confidence[j]))
            total += gaps * np.exp(-abs(float(confidence[i] - confidence[j])) / 0.4)
    assert float(kernel_error(confidence, correct)) == pytest.approx(total / 144)
    assert total >= 0


def test_one_image_gives_its_squared_gap() -> None:
    assert float(kernel_error(torch.tensor([0.7]), torch.tensor([1.0]))) == pytest.approx(0.09)


def test_images_that_are_as_often_right_as_they_say_cost_nothing() -> None:
    confidence, correct = torch.full((10,), 0.7).double(), (torch.arange(10) < 7).double()
    assert float(kernel_error(confidence, correct)) == pytest.approx(0, abs=1e-8)


def test_a_mixed_target_counts_as_right_as_far_as_it_is_of_the_predicted_class() -> None:
    output = torch.tensor([[0.7, 0.3]]).log()
    assert float(step(MMCE(), output, torch.tensor([[0.7, 0.3]]))["mmce"]) == pytest.approx(0, abs=1e-9)
    assert float(step(MMCE(), output, torch.tensor([[0.2, 0.8]]))["mmce"]) == pytest.approx(0.25)


def test_wrong_and_sure_answers_are_pulled_down() -> None:
    output = torch.tensor([[3.0, 0.0, 0.0]] * 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(step(MMCE(), output, torch.eye(3)[[1] * 4])["mmce"], output)
    assert (gradient[:, 0] > 0).all()


def test_a_quantized_network_trains_with_it_on_mixed_images_and_exports() -> None:
    methods: list[Method] = [CutMix(probability=1.0), MMCE(), Quantize(LSQWeight(4), EWGS(4), stream=MinMax(8))]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods)
    for number in range(2):
        assert trial.step(number).losses["mmce"].isfinite()
    finished = finish(trial.learner).eval()
    with torch.no_grad():
        assert close(finished(trial.image()), exported(finished, trial.image()))


def test_it_obeys_the_laws() -> None:
    check_method(MMCE)
