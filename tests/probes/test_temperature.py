"""Calibration after scaling: what was fitted where, and against the numbers of unscaled scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.probe import TEST, VALIDATION, Outputs
from galago.probes.calibration import Calibration
from galago.probes.temperature import TemperatureScaled, scaled
from galago.tasks.abstain import ClassifyOrAbstain
from galago.tasks.classify import Classify
from galago.temperature import fit_temperature, grid_temperature
from galago.testing import TinyImages, check_probe

GOLDEN = np.load(Path(__file__).parents[1] / "golden/regularization/reliability_metrics_calibration.npz")


def halves() -> dict[str, Outputs]:
    """The golden subset, the first half to fit on."""
    logits = torch.from_numpy(GOLDEN["logits"])
    target = nn.functional.one_hot(torch.from_numpy(GOLDEN["labels"].astype(np.int64)), 10).float()
    return {VALIDATION: Outputs(logits[:500], target[:500]), TEST: Outputs(logits[500:], target[500:])}


def test_numbers_are_those_of_calibration_on_scaled_test_scores() -> None:
    views = halves()
    found = TemperatureScaled().score(views, Classify(10))
    assert found["temperature"] == fit_temperature(*views[VALIDATION])
    assert found["grid_temperature"] == grid_temperature(*views[VALIDATION])
    after = Calibration().score(scaled(views[TEST], found["temperature"]), Classify(10))
    assert {name: found[f"{name}_scaled"] for name in ("ece", "nll", "brier")} == pytest.approx(
        {name: after[name] for name in ("ece", "nll", "brier")}, abs=1e-12
    )
    grid = Calibration().score(scaled(views[TEST], found["grid_temperature"]), Classify(10))
    assert found["ece_grid_scaled"] == pytest.approx(grid["ece"], abs=1e-12)


def test_an_overconfident_network_is_better_calibrated_afterwards() -> None:
    views = halves()
    before, after = Calibration().score(views[TEST], Classify(10)), TemperatureScaled().score(views, Classify(10))
    assert after["temperature"] > 2
    assert after["ece_scaled"] < 0.6 * before["ece"]
    assert after["nll_scaled"] < before["nll"]


def test_the_temperature_comes_from_validation_images_only() -> None:
    views = halves()
    other = views | {TEST: Outputs(views[TEST].output.flip(1), views[TEST].target)}
    found, changed = (TemperatureScaled().score(given, Classify(10)) for given in (views, other))
    assert found["temperature"] == changed["temperature"]
    assert found["grid_temperature"] == changed["grid_temperature"]
    assert found["nll_scaled"] < changed["nll_scaled"]


def test_both_sets_of_images_are_asked_for_by_their_names() -> None:
    assert TemperatureScaled().views(TinyImages()).keys() == {VALIDATION, TEST}


def test_a_task_with_an_output_more_than_classes_is_refused() -> None:
    views = {name: Outputs(torch.randn(6, 4), torch.eye(3).repeat(2, 1)) for name in (VALIDATION, TEST)}
    with pytest.raises(UserError, match="targets are 6×3, but scores are 6×4"):
        TemperatureScaled().score(views, ClassifyOrAbstain(3))


def test_test_scores_that_are_not_numbers_are_refused() -> None:
    views = halves()
    views[TEST].output[3] = torch.nan
    with pytest.raises(UserError, match="not finite for 1 of 500 images"):
        TemperatureScaled().score(views, Classify(10))


def test_no_bins_is_refused_with_advice() -> None:
    with pytest.raises(UserError, match="bins is 0"):
        TemperatureScaled(0)


def test_the_laws_of_probes_hold() -> None:
    check_probe(TemperatureScaled)
