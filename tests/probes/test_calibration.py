"""Calibration errors against golden vectors, torchmetrics, scikit-learn and hand-computed cases."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from galago.errors import UserError
from galago.probe import OutputProbe, Outputs
from galago.probes.calibration import Calibration, CalibrationDetails
from galago.reliability import (
    brier,
    class_wise_error,
    equal_counts,
    kolmogorov_smirnov,
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


DETAILS = [
    ("average_ce", "ace_avg"),
    ("l2_ce", "l2_ce"),
    ("overconfidence", "over_error"),
    ("underconfidence", "under_error"),
]


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize(("ours", "golden"), DETAILS)
def test_further_binned_errors_equal_the_golden_values(outputs: Outputs, bins: int, ours: str, golden: str) -> None:
    found = CalibrationDetails(bins).score(outputs, Classify(10))[ours]
    assert found == pytest.approx(float(GOLDEN[f"expected_{golden}{bins}"]), abs=1e-9)


@pytest.mark.parametrize(("ours", "golden"), [("ks_error", "ks_error"), ("entropy", "mean_entropy")])
def test_errors_without_bins_equal_the_golden_values(outputs: Outputs, ours: str, golden: str) -> None:
    found = CalibrationDetails().score(outputs, Classify(10))[ours]
    assert found == pytest.approx(float(GOLDEN[f"expected_{golden}"]), abs=1e-9)


@pytest.mark.parametrize("bins", [5, 10])
def test_further_errors_of_confidences_on_an_edge_equal_the_golden_values(bins: int) -> None:
    diagram = reliability(torch.from_numpy(GOLDEN["edge_conf"]), torch.from_numpy(GOLDEN["edge_correct"]), bins)
    assert diagram.average_error() == pytest.approx(float(GOLDEN[f"edge_expected_ace_avg{bins}"]), abs=1e-9)
    assert diagram.root_mean_square_error() == pytest.approx(float(GOLDEN[f"edge_expected_l2{bins}"]), abs=1e-9)
    assert diagram.overconfidence() == pytest.approx(float(GOLDEN[f"edge_expected_oe{bins}"]), abs=1e-9)
    assert diagram.underconfidence() == pytest.approx(float(GOLDEN[f"edge_expected_ue{bins}"]), abs=1e-9)


def random_answers(images: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    confidence = torch.rand(images, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(images, generator=generator) < 0.6


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_errors_agree_with_torchmetrics_where_no_confidence_is_on_an_edge(norm: Literal["l1", "l2", "max"]) -> None:
    confidence, correct = random_answers()
    stated = torch.where(correct, confidence, 1 - confidence)  # of class 1, so that class 1 is predicted where p > 0.5
    two = torch.stack([1 - stated, stated], 1)
    sure, predicted = two.max(1)
    diagram = reliability(sure, predicted == 1, 15)
    ours = {"l1": diagram.expected_error, "l2": diagram.root_mean_square_error, "max": diagram.largest_error}[norm]()
    theirs = multiclass_calibration_error(two, torch.ones(300).long(), num_classes=2, n_bins=15, norm=norm)
    assert ours == pytest.approx(float(theirs), abs=1e-5)


def test_over_and_underconfidence_are_loops_over_bins_and_below_the_expected_error() -> None:
    confidence, correct = random_answers()
    diagram = reliability(confidence, correct, 6)
    over = under = 0.0
    for m in range(6):
        inside = [i for i in range(300) if m / 6 < confidence[i] <= (m + 1) / 6]
        stated, right = (float(np.mean([float(values[i]) for i in inside])) for values in (confidence, correct))
        over += len(inside) / 300 * stated * max(stated - right, 0)
        under += len(inside) / 300 * stated * max(right - stated, 0)
    assert diagram.overconfidence() == pytest.approx(over)
    assert diagram.underconfidence() == pytest.approx(under)
    assert over + under <= diagram.expected_error() <= diagram.root_mean_square_error() <= diagram.largest_error()


def test_the_error_without_bins_is_a_loop_over_thresholds() -> None:
    confidence, correct = random_answers(60)
    gaps = [float((correct.double() - confidence)[confidence <= bound].sum()) / 60 for bound in confidence]
    assert kolmogorov_smirnov(confidence, correct) == pytest.approx(max(abs(gap) for gap in gaps))


def test_one_bin_gives_the_gap_between_accuracy_and_mean_confidence() -> None:
    confidence, correct = random_answers()
    diagram = reliability(confidence, correct, 1)
    gap = abs(float(confidence.mean() - correct.double().mean()))
    for found in (diagram.expected_error(), diagram.average_error(), diagram.root_mean_square_error()):
        assert found == pytest.approx(gap)


def test_a_constant_confidence_is_as_far_off_as_it_differs_from_the_accuracy() -> None:
    confidence, correct = torch.full((50,), 0.7), torch.arange(50) < 20
    assert reliability(confidence, correct).expected_error() == pytest.approx(0.3)
    assert equal_counts(confidence, correct).expected_error() == pytest.approx(0.54)  # the order of ties decides
    assert kolmogorov_smirnov(confidence, correct.flip(0)) == pytest.approx(0.42)  # and here


EDGES = {
    "one class of data": Outputs(
        torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.eye(3)[[0] * 40]
    ),
    "all predictions equal": Outputs(torch.tensor([[2.0, 1.0, 0.0]]).repeat(30, 1), torch.eye(3)[[0, 1, 2] * 10]),
    "fewer images than bins": Outputs(torch.tensor([[2.0, 1, 0], [0, 1, 2]]), torch.eye(3)[[0, 1]]),
    "one image": Outputs(torch.tensor([[2.0, 1, 0]]), torch.eye(3)[[0]]),
    "one output": Outputs(torch.zeros(5, 1), torch.ones(5, 1)),
}


@pytest.mark.parametrize("given", EDGES.values(), ids=EDGES.keys())
def test_strange_data_give_finite_errors_within_their_bounds(given: Outputs) -> None:
    classes = given.output.shape[1]
    found = Calibration().score(given, Classify(classes)) | CalibrationDetails().score(given, Classify(classes))
    assert all(np.isfinite(value) and value >= 0 for value in found.values())
    assert found["ece"] <= found["l2_ce"] + 1e-12 <= found["mce"] + 2e-12 <= 1 + 3e-12
    assert found["overconfidence"] + found["underconfidence"] <= found["ece"] + 1e-12
    assert found["entropy"] <= np.log(classes) + 1e-12


@pytest.mark.parametrize("probe", [Calibration(), CalibrationDetails()])
def test_scores_that_are_not_numbers_are_refused_with_their_count(probe: OutputProbe) -> None:
    output = torch.zeros(4, 3)
    output[1, 2], output[3, 0] = torch.nan, torch.inf
    with pytest.raises(UserError, match="not finite for 2 of 4 images"):
        probe.score(Outputs(output, torch.eye(3)[[0, 1, 2, 0]]), Classify(3))


def test_no_images_are_refused() -> None:
    with pytest.raises(UserError, match="no images"):
        Calibration().score(Outputs(torch.zeros(0, 3), torch.zeros(0, 3)), Classify(3))


@pytest.mark.parametrize("kind", [Calibration, CalibrationDetails])
def test_no_bins_is_refused_with_advice(kind: type[Calibration] | type[CalibrationDetails]) -> None:
    with pytest.raises(UserError, match="bins is 0"):
        kind(0)


@pytest.mark.parametrize("kind", [Calibration, CalibrationDetails])
def test_the_laws_of_probes_hold(kind: type[Calibration] | type[CalibrationDetails]) -> None:
    check_probe(kind)
