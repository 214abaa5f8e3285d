"""Figures of detection against scikit-learn, torchmetrics, loops over pairs and thresholds, and hand-made values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from galago.errors import UserError
from galago.laws.trial import TinyImages
from galago.probes.detection import (
    FOR_EACH,
    IN_THE_MEAN,
    aupr_in,
    aupr_out,
    auroc,
    average_precision,
    detection_error,
    fpr95,
    fpr95_ood_positive,
    numbers,
    threshold,
    told_apart,
)
from outsiders import two_sets

INSIDE = torch.tensor(
    [0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.95, 0.85, 0.75, 0.65, 0.58, 0.52, 0.48, 0.42, 0.38, 0.33],
    dtype=torch.float64,
)
OUTSIDE = torch.tensor([0.2, 0.4, 0.5, 0.6, 0.1], dtype=torch.float64)


def drawn(levels: int, seed: int = 0, inside: int = 101, outside: int = 67) -> tuple[Tensor, Tensor]:
    """Scores that overlap; of few levels, so that many are equal, or of very many."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(inside, generator=generator, dtype=torch.float64) + 1
    other = torch.randn(outside, generator=generator, dtype=torch.float64)
    return (levels * one).round() / levels, (levels * other).round() / levels


TIES = pytest.mark.parametrize(("levels", "seed"), [(1, 0), (2, 1), (5, 2), (10**6, 3)])


def test_the_scores_of_the_card_give_its_values() -> None:
    assert auroc(INSIDE, OUTSIDE) == pytest.approx(0.745)
    assert threshold(INSIDE) == pytest.approx(0.33)
    assert fpr95(INSIDE, OUTSIDE) == pytest.approx(0.6)
    assert detection_error(INSIDE, OUTSIDE) == pytest.approx(0.3)


@TIES
def test_auroc_is_the_share_of_pairs_in_order(levels: int, seed: int) -> None:
    inside, outside = drawn(levels, seed)
    pairs = [(a > b) + 0.5 * (a == b) for a in inside.tolist() for b in outside.tolist()]
    assert auroc(inside, outside) == pytest.approx(np.mean(pairs), abs=1e-12)


@TIES
def test_average_precision_agrees_with_a_loop_over_distinct_thresholds(levels: int, seed: int) -> None:
    positive, negative = drawn(levels, seed)
    total, before = 0.0, 0.0
    for level in sorted({*positive.tolist(), *negative.tolist()}, reverse=True):
        found, false = int((positive >= level).sum()), int((negative >= level).sum())
        total += (found / len(positive) - before) * found / (found + false)
        before = found / len(positive)
    assert average_precision(positive, negative) == pytest.approx(total, abs=1e-12)


@TIES
def test_areas_are_those_of_scikit_learn_and_torchmetrics(levels: int, seed: int) -> None:
    judge = pytest.importorskip("sklearn.metrics", reason="scikit-learn, to compare with, is not installed")
    inside, outside = drawn(levels, seed)
    score, label = torch.cat([inside, outside]), torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).int()
    assert auroc(inside, outside) == pytest.approx(judge.roc_auc_score(label, score), abs=1e-12)
    assert average_precision(inside, outside) == pytest.approx(judge.average_precision_score(label, score), abs=1e-12)
    wanted = judge.average_precision_score(1 - label, -score)
    assert average_precision(-outside, -inside) == pytest.approx(wanted, abs=1e-12)
    squeezed = (score - score.min()) / (score.max() - score.min())  # torchmetrics wants probabilities
    assert auroc(inside, outside) == pytest.approx(float(binary_auroc(squeezed, label)), abs=1e-5)
    assert average_precision(inside, outside) == pytest.approx(
        float(binary_average_precision(squeezed, label)), abs=1e-5
    )


@TIES
def test_errors_at_thresholds_agree_with_loops_over_them(levels: int, seed: int) -> None:
    inside, outside = drawn(levels, seed)
    passing = [level for level in inside.tolist() if 100 * int((inside >= level).sum()) >= 95 * len(inside)]
    assert threshold(inside) == max(passing)
    assert fpr95(inside, outside) == pytest.approx(float((outside >= max(passing)).double().mean()))
    flagging = [level for level in outside.tolist() if 100 * int((outside <= level).sum()) >= 95 * len(outside)]
    assert fpr95_ood_positive(inside, outside) == pytest.approx(float((inside <= min(flagging)).double().mean()))
    levels_and_beyond = [*inside.tolist(), *outside.tolist(), 99.0, -99.0]
    errors = [
        0.5 * float((inside < level).double().mean()) + 0.5 * float((outside >= level).double().mean())
        for level in levels_and_beyond
    ]
    assert detection_error(inside, outside) == pytest.approx(min(errors), abs=1e-12)


@TIES
def test_the_rate_at_a_threshold_is_that_of_scikit_learns_curve(levels: int, seed: int) -> None:
    judge = pytest.importorskip("sklearn.metrics", reason="scikit-learn, to compare with, is not installed")
    inside, outside = drawn(levels, seed, inside=200)
    label = torch.cat([torch.ones(200), torch.zeros(len(outside))])
    false, true, _ = judge.roc_curve(label, torch.cat([inside, outside]), drop_intermediate=False)
    assert fpr95(inside, outside) == pytest.approx(false[np.argmax(true >= 0.95)], abs=1e-12)


@pytest.mark.parametrize("images", [1, 2, 19, 20, 21, 60, 100, 9999])
def test_no_image_too_many_or_too_few_reaches_the_threshold(images: int) -> None:
    scores = torch.randperm(images).double()
    reached = int((scores >= threshold(scores)).sum())
    assert 100 * reached >= 95 * images > 100 * (reached - 1)


def test_perfect_separation_has_nothing_wrong() -> None:
    inside, outside = torch.linspace(2, 3, 40), torch.linspace(0, 1, 30)
    assert {name: figure(inside, outside) for name, figure in IN_THE_MEAN.items()} == pytest.approx(
        {"auroc": 1, "fpr95": 0, "fpr95_ood_positive": 0, "aupr_in": 1, "aupr_out": 1, "detection_error": 0}
    )
    assert {name: figure(outside, inside) for name, figure in FOR_EACH.items()} == {"auroc": 0, "fpr95": 1}
    assert detection_error(outside, inside) == 0.5


def test_equal_scores_tell_nothing() -> None:
    inside, outside = torch.zeros(50), torch.zeros(10)
    found = {name: figure(inside, outside) for name, figure in IN_THE_MEAN.items()}
    assert found == pytest.approx(
        {"auroc": 0.5, "fpr95": 1, "fpr95_ood_positive": 1, "aupr_in": 5 / 6, "aupr_out": 1 / 6, "detection_error": 0.5}
    )


def test_two_halves_of_one_set_are_not_told_apart() -> None:
    scores = torch.randn(4000)
    assert auroc(scores[:2000], scores[2000:]) == pytest.approx(0.5, abs=0.03)
    assert auroc(scores, scores) == 0.5
    assert fpr95(scores, scores) == 0.95


@TIES
def test_changing_sides_and_signs_changes_no_area(levels: int, seed: int) -> None:
    inside, outside = drawn(levels, seed)
    assert auroc(-outside, -inside) == pytest.approx(auroc(inside, outside), abs=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside), abs=1e-12)
    assert detection_error(-outside, -inside) == pytest.approx(detection_error(inside, outside), abs=1e-12)


@pytest.mark.parametrize("figure", IN_THE_MEAN.values(), ids=IN_THE_MEAN)
def test_a_growing_function_of_the_score_and_the_order_of_images_change_nothing(
    figure: Callable[[Tensor, Tensor], float],
) -> None:
    inside, outside = drawn(3, inside=100, outside=20)
    assert figure(inside[torch.randperm(100)].exp(), outside[torch.randperm(20)].exp()) == figure(inside, outside)


def test_aupr_is_taken_at_five_images_to_one_whatever_the_sets_hold() -> None:
    inside, outside = drawn(10**6, inside=1000, outside=200)
    assert aupr_in(inside, outside) == average_precision(inside, outside)
    assert aupr_out(inside, outside) == average_precision(-outside, -inside)
    many = torch.cat([outside] * 10)
    assert aupr_out(inside, many) == pytest.approx(aupr_out(inside, outside), abs=0.03)
    assert average_precision(-many, -inside) > aupr_out(inside, outside) + 0.1
    assert aupr_out(inside, many) == aupr_out(inside, many)


def test_float32_scores_are_compared_in_float64() -> None:
    inside, outside = torch.tensor([16777217.0], dtype=torch.float64), torch.tensor([16777216.0])
    assert auroc(inside, outside) == 1


def test_numbers_are_named_by_figure_score_and_set_and_averaged_over_the_sets() -> None:
    sets = {"a": OUTSIDE, "b": OUTSIDE - 1}
    found = numbers("msp", INSIDE, sets)
    each = {f"{figure}_msp_{name}" for figure in ("auroc", "fpr95") for name in "ab"}
    assert set(found) == each | {f"{figure}_msp_mean" for figure in IN_THE_MEAN}
    assert found["auroc_msp_a"] == auroc(INSIDE, OUTSIDE)
    assert found["auroc_msp_mean"] == pytest.approx((found["auroc_msp_a"] + 1) / 2)
    assert all(isinstance(value, float) for value in found.values())


def test_empty_sets_and_scores_that_are_no_numbers_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="birds holds no images"):
        numbers("msp", INSIDE, {"birds": OUTSIDE[:0]})
    with pytest.raises(UserError, match="the test set holds no images"):
        numbers("msp", INSIDE[:0], {"birds": OUTSIDE})
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="energy: the network's answers to 1 of 5 images of birds are no finite"):
            numbers("energy", INSIDE, {"birds": OUTSIDE.index_fill(0, torch.tensor([3]), wrong)})


def test_so_many_images_of_each_set_are_scored_from_its_whole_length() -> None:
    seen: list[Tensor] = []

    def contrast(image: Tensor) -> Tensor:
        seen.append(image)
        return -(image.double().std((1, 2, 3)) - 74).abs()  # that of uniform noise

    found = told_apart("contrast", contrast, TinyImages(), two_sets(), images=12)
    assert found["auroc_contrast_uniform"] < 0.1
    assert found["auroc_contrast_blobs"] > 0.9
    assert len(torch.cat(seen)) <= 3 * 12
    own = torch.cat([batch.input for batch in TinyImages().test()])
    assert [int((image == own).flatten(1).all(1).nonzero()) for image in torch.cat(seen)[:12]] == list(range(0, 48, 4))
