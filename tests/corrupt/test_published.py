"""Aggregates of error tables, against golden values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galago.corrupt.published import ALEXNET, ALEXNET_CLEAN, benchmark, extra, mce, mean_corruption_error, relative_mce
from photographs import FOLDER

GOLDEN = np.load(FOLDER / "reg_robustness_eval.npz")
ERRORS, REFERENCE = (torch.from_numpy(GOLDEN[name]) for name in ("errors", "reference_errors"))


def test_aggregates_are_the_golden_ones() -> None:
    assert mean_corruption_error(ERRORS) == pytest.approx(float(GOLDEN["mean_corruption_error"]), abs=1e-12)
    assert mce(ERRORS, REFERENCE) == pytest.approx(float(GOLDEN["mce"]), rel=1e-9)
    clean, reference_clean = float(GOLDEN["clean_error"]), float(GOLDEN["reference_clean_error"])
    found = relative_mce(ERRORS, clean, REFERENCE, reference_clean)
    assert found == pytest.approx(float(GOLDEN["relative_mce"]), rel=1e-9)


def test_means_over_severities_are_enough_of_the_reference() -> None:
    assert mce(ERRORS, REFERENCE.mean(1, keepdim=True)) == pytest.approx(mce(ERRORS, REFERENCE))


def test_alexnet_has_a_hundred_percent_of_its_own_errors() -> None:
    own = torch.tensor(list(ALEXNET.values()), dtype=torch.float64)[:, None].expand(15, 5)
    assert mce(own, own) == pytest.approx(100)
    assert relative_mce(own, ALEXNET_CLEAN, own, ALEXNET_CLEAN) == pytest.approx(100)


def test_fifteen_types_are_the_benchmark_and_four_are_kept() -> None:
    names = [corruption.name for corruption in benchmark()]
    assert [name.removesuffix("_synthetic") for name in names] == list(ALEXNET)
    assert [one.name for one in extra()] == ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
