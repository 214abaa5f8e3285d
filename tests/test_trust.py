"""Stored views, bootstrap intervals, and what is said of changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.errors import UserError
from galago.intervals import NOTHING, Estimate, drawn_again, estimates
from galago.probe import Outputs, collect, collect_each
from galago.probes.calibration import Calibration
from galago.tasks.classify import Classify
from galago.trust import Few, group, trust_run
from galago.verdicts import Change, alerts, told
from galago.views import StoredViews, fingerprint
from samples import Stripes


def said(images: int, seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(torch.randn(images, 3, generator=generator), torch.eye(3)[torch.arange(images) % 3])


# stored views


def test_a_view_is_read_back_as_it_was_stored(tmp_path: Path):
    stored, outputs = StoredViews(tmp_path / "model", "a"), said(5)
    assert stored.read("corrupted/fog/3") is None
    stored.write("corrupted/fog/3", outputs)
    again = stored.read("corrupted/fog/3")
    assert again is not None
    assert torch.equal(again.output, outputs.output)
    assert torch.equal(again.target, outputs.target)


def test_a_view_of_another_network_or_a_damaged_one_is_not_read(tmp_path: Path):
    StoredViews(tmp_path, "a").write("test", said(5))
    assert StoredViews(tmp_path, "b").read("test") is None
    whole = (tmp_path / "test.npz").read_bytes()
    (tmp_path / "test.npz").write_bytes(whole[: len(whole) // 2])
    assert StoredViews(tmp_path, "a").read("test") is None
    (tmp_path / "test.npz").write_bytes(b"")
    assert StoredViews(tmp_path, "a").read("test") is None


def test_a_stored_view_is_never_unpickled(tmp_path: Path):
    objects = np.array([{"harm": 1}], dtype=object)
    np.savez(tmp_path / "test.npz", allow_pickle=True, fingerprint=np.array("a"), output=objects, target=objects)
    assert StoredViews(tmp_path, "a").read("test") is None


def test_fingerprints_tell_files_and_texts_apart(tmp_path: Path):
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    first = fingerprint([file], "data")
    assert first == fingerprint([file], "data") != fingerprint([file], "other")
    file.write_bytes(b"2")
    assert fingerprint([file], "data") != first


def test_several_networks_see_the_same_batches_which_are_loaded_once():
    class Counting(list[Batch]):
        loaded = 0

        def __iter__(self):
            for batch in super().__iter__():
                type(self).loaded += 1
                yield batch

    class Raw(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, image: Tensor) -> Tensor:
            return self.factor * image.float().mean((1, 2, 3))[:, None]

    batches, networks = Counting(Stripes().validation()), [Raw(1.0), Raw(2.0)]
    once, twice = collect_each(networks, batches)
    assert Counting.loaded == len(batches)
    assert torch.equal(twice.output, 2 * once.output)
    assert torch.equal(once.output, collect(networks[0], batches).output)


# intervals


def mean(views: dict[str, Outputs]) -> dict[str, float]:
    return {"mean": float(views["test"].output.mean())}


def test_an_interval_is_that_of_the_normal_distribution_for_a_mean():
    outputs = Outputs(torch.randn(4000, 1, generator=torch.Generator().manual_seed(1)), torch.zeros(4000, 1))
    interval = estimates(mean, {"test": outputs}, rounds=1000)["mean"].interval()
    assert interval is not None
    error = 1.96 * float(outputs.output.std()) / 4000**0.5
    assert interval[1] - interval[0] == pytest.approx(2 * error, rel=0.1)
    assert sum(interval) / 2 == pytest.approx(float(outputs.output.mean()), abs=error / 10)


def test_an_interval_holds_the_calibration_error_although_every_draw_has_a_larger_one():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(600, 10, generator=generator)
    target = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]  # calibrated but for chance

    def score(views: dict[str, Outputs]) -> dict[str, float]:
        return Calibration().score(views["test"], Classify(10))

    found = estimates(score, {"test": Outputs(scores, torch.eye(10)[target])}, rounds=100)["ece"]
    low, high = found.interval() or (0.0, 0.0)
    assert np.quantile(found.draws, 0.025) > found.value - 0.001
    assert 0 <= low < found.value < high
    assert high - found.value < found.draws.std() * 3


def test_views_of_one_size_are_drawn_alike_so_that_images_stay_together():
    first, second = said(50), said(50)
    again = drawn_again({"a": first, "b": second, "c": said(20)}, seed=3)
    assert torch.equal(again["a"].output, again["b"].output)
    assert not torch.equal(again["a"].output, first.output)
    assert len(again["c"].output) == 20


def test_a_difference_is_taken_draw_by_draw():
    views = {"test": said(300)}
    one, other = (
        estimates(mean, {"test": Outputs(views["test"].output + shift, views["test"].target)}, 50)["mean"]
        for shift in (0.0, 0.25)
    )
    change = other.minus(one)
    assert change.value == pytest.approx(0.25, abs=1e-6)
    low, high = change.interval() or (0.0, 0.0)
    assert high - low < 1e-6, "the same draws: what both have in common cancels"
    assert other.minus(Estimate(0.0, NOTHING)).interval() is None


# changes and alerts


def change(metric: str, value: float, spread: float = 0.0, before: str = "before", after: str = "model") -> Change:
    return Change(before, after, metric, Estimate(value, value + spread * np.linspace(-1, 1, 41)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([change("ece", 0.006)], ["Worse: calibration error (ECE) moved by +0.6 points (+0.6 to +0.6)"]),
        ([change("ece", -0.006)], ["Better: calibration error (ECE) moved by −0.6 points"]),
        ([change("ece", 0.004)], []),
        ([change("accuracy", -0.02), change("corruption_error", 0.01)], []),
        ([change("accuracy", -0.02), change("corruption_error", 0.03)], ["Worse: error on corrupted images"]),
        ([change("accuracy", -0.02), change("auroc_energy_mean", -0.03)], ["Worse: AUROC of known against"]),
        ([change("accuracy", -0.02), change("auroc_msp_mean", 0.03)], ["Better: AUROC of known against"]),
        ([change("accuracy", 0.0), change("corruption_error", 0.0004)], []),
        ([change("accuracy", -0.05), change("nll", 1.0)], []),
    ],
)  # fmt: skip
def test_what_moved_more_than_expected_is_said_and_nothing_else(changes: list[Change], expected: list[str]):
    found = list(alerts(changes))
    assert len(found) == len(expected)
    assert all(one.startswith(start) for one, start in zip(found, expected, strict=True))


def test_an_alert_says_where_it_could_be_chance():
    assert "it could be chance" in next(alerts([change("ece", 0.01, spread=0.03)]))
    assert "chance" not in next(alerts([change("ece", 0.01, spread=0.001)]))


def test_each_step_of_the_way_is_judged_by_its_own_accuracy():
    found = list(
        alerts(
            [
                change("accuracy", -0.05),
                change("corruption_error", 0.02),
                change("accuracy", 0.0, before="model", after="onnx"),
                change("corruption_error", 0.02, before="model", after="onnx"),
            ]
        )
    )
    assert len(found) == 1
    assert "from the trained model to the ONNX file" in found[0]


def test_rows_and_changes_are_told_as_plain_data():
    numbers = {"accuracy": Estimate(0.5, np.array([0.4, 0.6])), "attack": Estimate(0.1, NOTHING)}
    written = told({"before": numbers, "model": numbers, "onnx": {"accuracy": numbers["accuracy"]}})
    assert {"form": "model", "metric": "attack", "value": 0.1, "low": None, "high": None} in written["rows"]
    steps = [(one["from"], one["to"], one["metric"]) for one in written["changes"]]
    assert steps == [("before", "model", "accuracy"), ("before", "model", "attack"), ("model", "onnx", "accuracy")]
    assert {one["value"] for one in written["changes"]} == {0.0}
    assert written["alerts"] == []


# the group


def test_fewer_test_images_are_spread_over_the_set_and_the_rest_stays():
    data = Stripes(images=48, batch_size=16)
    few = Few(data, 6)
    assert [len(batch.input) for batch in few.test()] == [2, 2, 2]
    assert len(list(Few(data, 40).test())) == 3, "all of them: it is nearly as many"
    assert len(few.validation()) == 3
    few.seed = 5
    assert torch.equal(few.train(1)[0].input, data.train(1)[0].input)


def test_a_recipes_own_probe_replaces_the_usual_one_of_its_class():
    from galago.probes.calibration import Calibration

    own = Calibration(bins=3)
    chosen = group([1], None, [own])
    assert [probe for probe in chosen if isinstance(probe, Calibration)] == [own]
    assert len(chosen) == len(group([1], None))


def test_too_few_images_and_unfinished_runs_are_refused_in_words(tmp_path: Path):
    with pytest.raises(UserError, match="give at least 2"):
        trust_run(tmp_path, images=1)
    with pytest.raises(UserError, match="rounds is -1; give 0 for no intervals"):
        trust_run(tmp_path, rounds=-1)
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        trust_run(tmp_path)
