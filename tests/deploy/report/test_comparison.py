"""What shrinking cost: the numbers of the comparison, and the statistics behind its intervals."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from galago.deploy.report.comparison import Cost, what_it_cost
from galago.deploy.report.predictions import Predictions, compare, mcnemar, read_predictions
from galago.deploy.report.reading import read_record
from galago.errors import UserError
from galago.probe import Outputs
from galago.probes.calibration import Calibration
from galago.probes.selective import Selective
from galago.reliability import brier, negative_log_likelihood, reliability
from galago.tasks.abstain import ClassifyOrAbstain

Write = Callable[..., Path]


def cost_of(run: Path, against: Path) -> Cost:
    return what_it_cost(read_record(run), read_record(against))


def row(cost: Cost, what: str) -> tuple[str, str, str, str]:
    found = next(row for row in cost.rows if row.what == what)
    return found.before, found.after, found.difference, found.words


def edit(folder: Path, form: str, **numbers: float) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics[form].update(numbers)
    (folder / "metrics.json").write_text(json.dumps(metrics))


def save(folder: Path, output: np.ndarray, target: np.ndarray) -> None:
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "predictions" / "onnx.npz", output=output, target=target)


def test_size_operations_and_latency_are_compared_in_words(write_run: Write) -> None:
    cost = cost_of(write_run("student"), write_run("teacher", bits=None))
    assert row(cost, "Size") == ("1.1 MB, trained model", "0.19 MB, ONNX file", "−83 %", "5.9 × smaller")
    assert row(cost, "Multiply-accumulates") == ("40.8 M", "40.8 M", "0 %", "unchanged")
    assert row(cost, "Bit operations") == ("42.0 G", "697 M", "−98 %", "60 × fewer")
    assert row(cost, "Latency, OpenVINO") == ("0.520 ms, fp32", "0.214 ms, integer", "−59 %", "2.4 × faster")


def test_accuracy_row_counts_the_images_that_were_lost_and_gained(write_run: Write) -> None:
    run, other = write_run("student"), write_run("teacher", bits=None)
    cost = cost_of(run, other)
    before, after = read_record(other).predictions["model"], read_record(run).predictions["onnx"]
    lost = int(((before.correct == 1) & (after.correct == 0)).sum())
    gained = int(((before.correct == 0) & (after.correct == 1)).sum())
    assert (cost.paired.only_before, cost.paired.only_after) == (lost, gained)
    said = row(cost, "Accuracy")
    assert said[0] == f"{100 * before.correct.mean():.2f} %"
    assert said[1] == f"{100 * after.correct.mean():.2f} %"
    assert said[3].startswith(f"{lost - gained} of 1,000 images fewer right: {lost} lost, {gained} gained")


def test_calibration_alerts_only_beyond_half_a_point(write_run: Write) -> None:
    run, other = write_run("student"), write_run("teacher", bits=None)
    edit(other, "model", ece=0.020)
    for after, alerts in ((0.0249, 0), (0.0151, 0), (0.0252, 1), (0.0148, 1)):
        edit(run, "onnx", ece=after)
        assert len(cost_of(run, other).alerts) == alerts
    assert "Calibration improved by 0.5 points" in cost_of(run, other).alerts[0]


def test_runs_on_other_images_get_no_interval(write_run: Write) -> None:
    run, other = write_run("student"), write_run("teacher", bits=None)
    with np.load(other / "predictions" / "model.npz") as stored:
        output, target = stored["output"], stored["target"]
    np.savez(other / "predictions" / "model.npz", output=output[::-1], target=target[::-1])
    cost = cost_of(run, other)
    assert cost.paired is None
    assert "(" not in row(cost, "Accuracy")[2]
    assert any("different images" in remark for remark in cost.remarks)


def test_scores_equal_those_of_the_calibration_probe(write_run: Write) -> None:
    import torch

    run = write_run("student")
    with np.load(run / "predictions" / "onnx.npz") as stored:
        output, target = torch.from_numpy(stored["output"]), torch.from_numpy(stored["target"])
    probability = output.double().softmax(1)
    confidence, predicted = probability.max(1)
    answers = read_predictions(run / "predictions")["onnx"]
    assert answers.surprise.mean() == pytest.approx(negative_log_likelihood(probability, target), abs=1e-12)
    assert answers.distance.mean() == pytest.approx(brier(probability, target), abs=1e-12)
    expected = reliability(confidence, (predicted == target).double()).expected_error()
    assert answers.bins().expected_error() == pytest.approx(expected, abs=1e-12)
    nothing = certain(len(target), answers.target)
    assert compare(nothing, answers, rounds=1).ece.difference == pytest.approx(expected, abs=1e-12)


def certain(images: int, target: np.ndarray) -> Predictions:
    """A network that is always right and sure of it."""
    ones, zeros = np.ones(images), np.zeros(images)
    return Predictions(target, ones, ones, zeros, zeros)


def answering(correct: np.ndarray) -> Predictions:
    """A network of which only right and wrong matter."""
    zeros = np.zeros(len(correct))
    return Predictions(np.zeros(len(correct), np.int64), np.full(len(correct), 0.9), correct, zeros, zeros)


def test_a_network_compared_with_itself_differs_by_exactly_nothing() -> None:
    one = answering((np.arange(200) % 7 > 0).astype(float))
    paired = compare(one, one, rounds=50)
    assert paired.accuracy == (0.0, 0.0, 0.0)
    assert (paired.only_before, paired.only_after, paired.p) == (0, 0, 1.0)


def test_the_paired_interval_has_the_width_that_theory_gives() -> None:
    before, after = np.ones(2000), np.ones(2000)
    after[:120], before[120:180] = 0, 0
    paired = compare(answering(before), answering(after), rounds=2000)
    deviation = math.sqrt((180 / 2000 - 0.03**2) / 2000)
    assert paired.accuracy.difference == pytest.approx(-0.03)
    assert paired.accuracy.low == pytest.approx(-0.03 - 1.96 * deviation, abs=0.0015)
    assert paired.accuracy.high == pytest.approx(-0.03 + 1.96 * deviation, abs=0.0015)


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (3, 3), (5, 17), (40, 20), (700, 640)])
def test_mcnemar_equals_the_binomial_test_counted_out(lost: int, gained: int) -> None:
    n = lost + gained
    tail = sum(math.comb(n, i) for i in range(min(lost, gained) + 1))
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail / 2**n), rel=1e-9, abs=1e-11)


def test_a_confidence_on_an_edge_belongs_to_the_bin_it_ends() -> None:
    confidence = np.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.65, 0.6, 0.55, 0.5, 0.45])
    correct = np.array([1.0, 1, 0, 1, 1, 1, 0, 0, 1, 0])
    zeros, target = np.zeros(10), np.zeros(10, np.int64)
    golden = Predictions(target, confidence, correct, zeros, zeros)
    assert golden.bins().expected_error() == pytest.approx(0.39)
    assert compare(certain(10, target), golden, rounds=1).ece.difference == pytest.approx(0.39)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    np.savez(tmp_path / "predictions" / "onnx.npz", output=np.array([{}], object), target=np.zeros(1, int))
    with pytest.raises(UserError, match=r"onnx\.npz is damaged"):
        read_predictions(tmp_path / "predictions")


def test_an_array_that_claims_more_than_is_stored_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "onnx.npz"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 10), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("output.npy", "target.npy"):
            archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UserError, match="claims 3999999999960 bytes"):
        read_predictions(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "empty archive"]
)
def test_a_damaged_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "onnx.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"onnx\.npz"):
        read_predictions(tmp_path)


@pytest.mark.parametrize("target", [np.array([0, 1, 3]), np.array([0, -1, 2]), np.array([0, 1]), np.zeros((3, 3))])
def test_targets_that_fit_no_output_are_refused(tmp_path: Path, target: np.ndarray) -> None:
    save(tmp_path, np.zeros((3, 3), np.float32), target)
    with pytest.raises(UserError, match="does not hold the class"):
        read_predictions(tmp_path / "predictions")


def test_outputs_that_are_no_class_scores_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, np.zeros((3, 4, 5), np.float32), np.zeros(3, int))
    assert read_predictions(tmp_path / "predictions") == {}


def gambles(images: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs of a network with four classes that may abstain, labels, and reservations."""
    draws = np.random.default_rng(0)
    output = 2 * draws.standard_normal((images, 5)).astype(np.float32)
    reservation = ClassifyOrAbstain(4).reservation(torch.from_numpy(output).double())
    return output, draws.integers(0, 4, images), reservation.numpy()


def test_a_network_that_may_abstain_is_judged_by_its_classes_and_ranked_by_its_reservation(tmp_path: Path) -> None:
    output, target, reservation = gambles()
    np.savez(tmp_path / "model.npz", output=output, target=target, reservation=reservation)
    answers = read_predictions(tmp_path)["model"]
    outputs = Outputs(torch.from_numpy(output), torch.eye(4)[torch.from_numpy(target)])
    numbers = Calibration().score(outputs, ClassifyOrAbstain(4))
    assert answers.bins().expected_error() == pytest.approx(numbers["ece"])
    assert answers.surprise.mean() == pytest.approx(numbers["nll"])
    assert answers.distance.mean() == pytest.approx(numbers["brier"])
    ranked = Selective().score(outputs, ClassifyOrAbstain(4))
    assert answers.risks().mean() == pytest.approx(ranked["aurc_reservation"])
    assert answers._replace(reservation=None).risks()[-1] == pytest.approx(answers.risks()[-1])


@pytest.mark.parametrize("reservation", [np.zeros(3), np.full(60, np.nan), np.zeros((60, 1))])
def test_reservations_that_fit_no_output_are_refused(tmp_path: Path, reservation: np.ndarray) -> None:
    output, target, _ = gambles()
    np.savez(tmp_path / "model.npz", output=output, target=target, reservation=reservation)
    with pytest.raises(UserError, match="does not hold a number for each"):
        read_predictions(tmp_path)


def test_a_reservation_that_claims_more_than_is_stored_takes_no_memory(tmp_path: Path) -> None:
    output, target, _ = gambles()
    np.savez(tmp_path / "model.npz", output=output, target=target)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(tmp_path / "model.npz", "a") as archive:
        archive.writestr("reservation.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UserError, match="claims 799999999992 bytes"):
        read_predictions(tmp_path)
