"""How well two sets of images are told apart by one number each: the figures of out-of-distribution detection.

Dan Hendrycks, Kevin Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
Networks", ICLR 2017, arXiv:1610.02136 (areas); Shiyu Liang, Yixuan Li, R. Srikant, "Enhancing the Reliability of
Out-of-distribution Image Detection in Neural Networks", ICLR 2018, arXiv:1706.02690 (error at a rate, detection error).

A score S is higher for images that look like those of training. With S_in on test images and S_out on others:

    AUROC      P(S_in > S_out) + ½ P(S_in = S_out)
    AUPR-in    Σ_n (R_n - R_{n-1}) P_n over the scores from the highest down, equal ones at once, S_in to be found
    AUPR-out   the same with -S_out to be found among -S_in
    FPR@95     P(S_out ≥ τ), where τ is the largest S_in with P(S_in ≥ τ) ≥ 0.95
    error      min over τ of ½ [P(S_in < τ) + P(S_out ≥ τ)]

Exact for equal scores, which integer networks give often: chance is an AUROC of 0.5, an FPR@95 of 1 and an error of
0.5 where all scores are equal. AUPR hangs on how many images there are of each kind, so it is taken at five test images
to one from outside: the mean over ten draws of N / 5 images, or all images at once where there are no more than that.

Where sources differ: FPR@95 has the test images as positives and the first threshold that finds 95 % of them. Its
benchmark variant `fpr95_ood_positive` is the share of test images that are flagged where 95 % of the others are. AUPR
is no trapezoid. All in float64; shares of 95 % are counted in whole images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from galago.data import Data, Loader
from galago.errors import UserError
from galago.outside import Outside
from galago.probe import spread

DRAWS, SHARE = 10, 5
Figure = Callable[[Tensor, Tensor], float]  # of scores inside and outside


def auroc(inside: Tensor, outside: Tensor) -> float:
    """`P(S_in > S_out) + ½ P(S_in = S_out)`. Scores N and M.

    >>> auroc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]))
    0.875
    """
    ordered = outside.double().sort().values
    below, up_to = (torch.searchsorted(ordered, inside.double(), right=right).sum() for right in (False, True))
    return float(below + up_to) / (2 * len(inside) * len(outside))


def average_precision(positive: Tensor, negative: Tensor) -> float:
    """`Σ_n (R_n - R_{n-1}) P_n` for positives that are to have the higher scores. Scores N and M.

    >>> average_precision(torch.tensor([0.9, 0.4]), torch.tensor([0.5]))
    0.8333333333333333
    """
    thresholds = torch.cat([positive, negative]).double().sort(descending=True).values
    found, false = (at_least(thresholds, scores) for scores in (positive, negative))
    recall = found / len(positive)
    gained = recall.diff(prepend=torch.zeros(1, dtype=torch.float64))
    return float((gained * found / (found + false)).sum())


def at_least(thresholds: Tensor, scores: Tensor) -> Tensor:
    """How many scores reach each threshold, float64."""
    below = torch.searchsorted(scores.double().sort().values, thresholds)
    return (len(scores) - below).double()


def threshold(inside: Tensor, percent: int = 95) -> float:
    """The largest score that so many of the images reach: what lies below it is taken for an image from outside.

    >>> threshold(torch.arange(20.0))
    1.0
    """
    needed = -(-percent * len(inside) // 100)
    return float(inside.double().sort(descending=True).values[needed - 1])


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """Which share of the images from outside passes where 95 % of the others do. Scores N and M."""
    return float((outside.double() >= threshold(inside)).double().mean())


def fpr95_ood_positive(inside: Tensor, outside: Tensor) -> float:
    """Which share of the images inside is flagged where 95 % of those from outside are. Scores N and M."""
    return fpr95(-outside.double(), -inside.double())


def detection_error(inside: Tensor, outside: Tensor) -> float:
    """`min_τ ½ [P(S_in < τ) + P(S_out ≥ τ)]`, at most 0.5. Scores N and M.

    >>> detection_error(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.5]))
    0.25
    """
    thresholds = torch.cat([inside, outside]).double()
    missed = 1 - at_least(thresholds, inside) / len(inside)
    passed = at_least(thresholds, outside) / len(outside)
    return min(0.5, float((missed + passed).min()) / 2)


def aupr_in(inside: Tensor, outside: Tensor) -> float:
    """AUPR of the images inside, five to one from outside. Scores N and M."""
    return _over_draws(average_precision, inside, outside)


def aupr_out(inside: Tensor, outside: Tensor) -> float:
    """AUPR of the images from outside, one to five inside. Scores N and M."""
    return _over_draws(lambda one, other: average_precision(-other, -one), inside, outside)


def _over_draws(figure: Figure, inside: Tensor, outside: Tensor) -> float:
    wanted, generator = max(1, len(inside) // SHARE), torch.Generator().manual_seed(0)
    if len(outside) <= wanted:
        return figure(inside, outside)
    drawn = [outside[torch.randperm(len(outside), generator=generator)[:wanted]] for _ in range(DRAWS)]
    return sum(figure(inside, one) for one in drawn) / DRAWS


FOR_EACH: dict[str, Figure] = {"auroc": auroc, "fpr95": fpr95}
IN_THE_MEAN: dict[str, Figure] = FOR_EACH | {
    "fpr95_ood_positive": fpr95_ood_positive,
    "aupr_in": aupr_in,
    "aupr_out": aupr_out,
    "detection_error": detection_error,
}


def numbers(score: str, inside: Tensor, outside: Mapping[str, Tensor]) -> dict[str, float]:
    """`auroc_{score}_{set}` and `fpr95_{score}_{set}` of each set from outside, and all six figures' means over them.

    Args:
        score: its name.
        inside: N scores of test images.
        outside: scores of other images by the name of their set.

    Raises:
        UserError: a set is empty, or a score is no number.
    """
    for where, scores in {"the test set": inside, **outside}.items():
        _require_numbers(score, where, scores)
    found = {
        f"{name}_{score}_{where}": figure(inside, scores)
        for where, scores in outside.items()
        for name, figure in FOR_EACH.items()
    }
    for name, figure in IN_THE_MEAN.items():
        found[f"{name}_{score}_mean"] = sum(figure(inside, scores) for scores in outside.values()) / len(outside)
    return found


def _require_numbers(score: str, where: str, scores: Tensor) -> None:
    if not len(scores):
        raise UserError(f"{where} holds no images, so nothing can be told apart; leave it out of `outside`")
    if wrong := int((~scores.isfinite()).sum()):
        raise UserError(
            f"{score}: the network's answers to {wrong} of {len(scores)} images of {where} are no finite numbers;"
            " its training has diverged, or its numbers are too large for the format it computes in"
        )


def told_apart(
    name: str, score: Callable[[Tensor], Tensor], data: Data, outside: Sequence[Outside], images: int
) -> dict[str, float]:
    """`numbers` of a score that needs more of a network than its outputs.

    Args:
        name: of the score.
        score: from raw images to a number each.
        data: whose test images are inside.
        outside: the other sets.
        images: of each set, at most, spread evenly over it.
    """

    def scored(view: Loader) -> Tensor:
        parts = [score(batch.input).detach().double().cpu() for batch in spread(view, images)]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])

    return numbers(name, scored(data.test()), {one.name: scored(one.test(data)) for one in outside})
