"""Calibration errors against golden vectors, torchmetrics, scikit-learn and hand-computed cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from galago.errors import UserError
from galago.probe import Outputs
from galago.probes.calibration import (
    Calibration,
    brier,
    class_wise_error,
    equal_counts,
    negative_log_likelihood,
    reliability,
)
from galago.tasks.classify import Classify
from galago.testing import check_probe

GOLDEN = np.load(Path(__file__).parents[1] / "golden/regularization/reliability_metrics_calibration.npz")
CONFIDENCE = torch.tensor([0.95, 0.9, 0.85, 0.8, 0.75, 0.65, 0.6, 0.55, 0.5, 0.45], dtype=torch.float64)
CORRECT = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 0])
BINS = (1, 5, 10, 15, 20)


@pytest.fixture(scope="module")
def outputs() -> Outputs:
    labels = torch.from_numpy(GOLDEN["labels"].astype(np.int64))
    return Outputs(torch.from_numpy(GOLDEN["logits"]), torch.nn.functional.one_hot(labels, 10).float())


def probabilities(outputs: Outputs) -> Tensor:
    return outputs.output.double().softmax(1)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize(
    ("ours", "golden"), [("ece", "ece"), ("mce", "mce"), ("adaptive_ece", "aece"), ("class_wise_ece", "cece")]
)
def test_binned_errors_equal_the_golden_values(outputs: Outputs, bins: int, ours: str, golden: str) -> None:
    found = Calibration(bins).score(outputs, Classify(10))[ours]
    assert found == pytest.approx(float(GOLDEN[f"expected_{golden}{bins}"]), abs=1e-9)


@pytest.mark.parametrize("name", ["nll", "brier"])
def test_proper_scores_equal_the_golden_values(outputs: Outputs, name: str) -> None:
    assert Calibration().score(outputs, Classify(10))[name] == pytest.approx(
        float(GOLDEN[f"expected_{name}"]), abs=1e-9
    )


def test_the_diagram_equals_the_golden_bins(outputs: Outputs) -> None:
    diagram = Calibration(15).diagram(outputs, Classify(10))
    assert diagram.images.tolist() == GOLDEN["expected_bin_count"].tolist()
    filled = GOLDEN["expected_bin_count"] > 0  # the golden file marks empty bins by -1
    np.testing.assert_allclose(diagram.accuracy.numpy()[filled], GOLDEN["expected_bin_accuracy"][filled], atol=1e-9)
    np.testing.assert_allclose(diagram.confidence.numpy()[filled], GOLDEN["expected_bin_confidence"][filled], atol=1e-9)


def test_classes_that_no_image_has_still_count(outputs: Outputs) -> None:
    label = outputs.target.argmax(1)
    found = class_wise_error(probabilities(outputs)[label < 7], label[label < 7], 15)
    assert found == pytest.approx(float(GOLDEN["expected_cece15_labels_below_7"]), abs=1e-9)


@pytest.mark.parametrize("bins", [5, 10])
def test_confidences_on_an_edge_belong_to_the_bin_that_ends_there(bins: int) -> None:
    diagram = reliability(torch.from_numpy(GOLDEN["edge_conf"]), torch.from_numpy(GOLDEN["edge_correct"]), bins)
    assert diagram.expected_error() == pytest.approx(float(GOLDEN[f"edge_expected_ece{bins}"]), abs=1e-9)
    assert diagram.largest_error() == pytest.approx(float(GOLDEN[f"edge_expected_mce{bins}"]), abs=1e-9)


def test_equal_counts_keep_every_image_on_an_edge() -> None:
    diagram = equal_counts(torch.from_numpy(GOLDEN["edge_conf"]), torch.from_numpy(GOLDEN["edge_correct"]), 5)
    assert diagram.expected_error() == pytest.approx(float(GOLDEN["edge_expected_aece5"]), abs=1e-9)


@pytest.mark.parametrize(
    ("bins", "ece", "mce"), [(1, 0.10, 0.10), (5, 0.26, 0.275), (10, 0.28, 0.575), (15, 0.39, 0.85)]
)
def test_ten_confidences_give_the_values_of_the_card(bins: int, ece: float, mce: float) -> None:
    diagram = reliability(CONFIDENCE, CORRECT, bins)
    assert diagram.expected_error() == pytest.approx(ece, abs=1e-12)
    assert diagram.largest_error() == pytest.approx(mce, abs=1e-12)


def test_two_rows_give_the_brier_score_of_the_card() -> None:
    logits, label = torch.tensor([[2.0, 1, 0], [0, 1, 3]]).double(), torch.tensor([0, 1])
    assert brier(logits.softmax(1), label) == pytest.approx(0.839232845, abs=1e-9)
    assert negative_log_likelihood(logits.softmax(1), label) == pytest.approx(1.288725992, abs=1e-9)


def test_expected_error_agrees_with_torchmetrics(outputs: Outputs) -> None:
    theirs = multiclass_calibration_error(probabilities(outputs), outputs.target.argmax(1), num_classes=10, n_bins=15)
    assert Calibration(15).score(outputs, Classify(10))["ece"] == pytest.approx(float(theirs), abs=1e-5)


def test_likelihood_agrees_with_scikit_learn(outputs: Outputs) -> None:
    label = outputs.target.argmax(1)
    theirs = log_loss(label.numpy(), probabilities(outputs).numpy(), labels=list(range(10)))
    assert negative_log_likelihood(probabilities(outputs), label) == pytest.approx(theirs, abs=1e-10)


def test_bins_agree_with_a_loop_over_images() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    correct = torch.rand(500, generator=generator) < 0.7
    diagram = reliability(confidence, correct, 7)
    for m in range(7):
        inside = [i for i in range(500) if m / 7 < confidence[i] <= (m + 1) / 7]
        assert diagram.images[m] == len(inside)
        assert diagram.accuracy[m] == pytest.approx(np.mean([float(correct[i]) for i in inside]))
        assert diagram.confidence[m] == pytest.approx(np.mean([float(confidence[i]) for i in inside]))


def test_an_error_does_not_depend_on_the_order_of_images() -> None:
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    shuffled = reliability(CONFIDENCE[order], CORRECT[order], 15).expected_error()
    assert shuffled == pytest.approx(reliability(CONFIDENCE, CORRECT, 15).expected_error(), abs=1e-12)


def test_sure_and_right_is_perfectly_calibrated() -> None:
    target = torch.eye(4)
    found = Calibration().score(Outputs(1e4 * target, target), Classify(4))
    assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=1e-12)


def test_sure_and_wrong_has_a_finite_likelihood() -> None:
    found = Calibration().score(Outputs(1e6 * torch.eye(3), torch.eye(3).roll(1, 0)), Classify(3))
    assert found["nll"] == pytest.approx(708.4, abs=0.1)
    assert found["brier"] == pytest.approx(2.0)


def test_labels_drawn_from_the_prediction_are_calibrated() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    label = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    target = torch.nn.functional.one_hot(label, 5).float()
    assert Calibration().score(Outputs(logits, target), Classify(5))["ece"] < 0.012
    assert Calibration().score(Outputs(3 * logits, target), Classify(5))["ece"] > 0.1


def test_no_bins_is_refused_with_advice() -> None:
    with pytest.raises(UserError, match="bins is 0"):
        Calibration(0)


def test_the_laws_of_probes_hold() -> None:
    check_probe(Calibration)
