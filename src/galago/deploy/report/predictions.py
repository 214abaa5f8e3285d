"""What a network answered to every test image, and whether two networks that saw the same images differ.

Paired comparison: both networks saw the same images, so differences are taken image by image and the images are drawn
again with replacement (the bootstrap of Efron, Annals of Statistics 1979), which is far sharper than two separate
intervals. For right and wrong answers alone McNemar's exact test (Psychometrika 1947) looks only at the images on
which the two disagree: under "no difference" each of the n = b + c of them is a coin toss,

    p = min(1, 2 · Σ_{i ≤ min(b, c)} C(n, i) / 2^n).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from galago.errors import UserError
from galago.intervals import around
from galago.probes.paired import paired_difference
from galago.probes.selective import risks
from galago.reliability import Bins, reliability

SECTIONS = ("model", "onnx", "openvino")  # the forms of a network, as in metrics.json
BINS = 15
_LARGEST = 1_000_000_000  # bytes of one array
_BLOCK = 4096  # images judged at once
Values = NDArray[np.float64]


class Predictions(NamedTuple):
    """One network's answers, image by image (N)."""

    target: NDArray[np.int64]
    confidence: Values  # probability of the predicted class
    correct: Values  # 1 where the answer was right
    surprise: Values  # −log of the true class's probability, in nats
    distance: Values  # squared distance from the truth, summed over classes
    reservation: Values | None = None  # how far the network abstained, where it can

    def bins(self) -> Bins:
        """The reliability diagram."""
        return reliability(torch.from_numpy(self.confidence), torch.from_numpy(self.correct), BINS)

    def risks(self) -> Values:
        """The share of wrong answers among the i images it is most certain of, for every i."""
        unsure = 1 - self.confidence if self.reservation is None else self.reservation
        found: Values = risks(torch.from_numpy(unsure), torch.from_numpy(self.correct)).numpy()
        return found


class Interval(NamedTuple):
    """A difference after − before, and where 95 % of the resampled differences lie."""

    difference: float
    low: float
    high: float


class Paired(NamedTuple):
    """Two networks on the same images."""

    images: int
    only_before: int  # images that only the first one had right
    only_after: int
    p: float
    accuracy: Interval
    ece: Interval
    nll: Interval
    brier: Interval


def read_predictions(folder: Path) -> dict[str, Predictions]:
    """The stored outputs of a classifier, by form of the network; other outputs than class scores are passed over.

    Raises:
        UserError: a file is damaged.
    """
    found = {}
    for section in SECTIONS:
        path = folder / f"{section}.npz"
        if path.exists() and (answers := _judged(*_arrays(path), path)) is not None:
            found[section] = answers
    return found


def compare(before: Predictions, after: Predictions, rounds: int = 1000, seed: int = 0) -> Paired | None:
    """Every difference with its interval; None when the two did not see the same images.

    Args:
        before: the network one had.
        after: the network one has now.
        rounds: how often the images are drawn again.
        seed: of the draws.
    """
    if not np.array_equal(before.target, after.target):
        return None
    images, draws = len(after.target), np.random.default_rng(seed)
    tables = _table(before), _table(after)
    found = [_differences(*tables, np.ones(images))]
    for _ in range(rounds):
        drawn = np.bincount(draws.integers(0, images, images), minlength=images)
        found.append(_differences(*tables, drawn.astype(np.float64)))
    low, high = around(found[0], np.stack(found[1:]))
    intervals = [Interval(*map(float, values)) for values in zip(found[0], low, high, strict=True)]
    worse = int((before.correct > after.correct).sum())
    better = int((after.correct > before.correct).sum())
    right = [torch.from_numpy(one.correct) for one in (before, after)]
    accuracy = Interval(*paired_difference(right[0], right[1], rounds, seed=seed))
    return Paired(images, worse, better, mcnemar(worse, better), accuracy, *intervals)


def mcnemar(only_before: int, only_after: int) -> float:
    """Chance of a split at least this uneven if neither network were better.

    >>> mcnemar(0, 0), mcnemar(1, 4), round(mcnemar(0, 10), 6)
    (1.0, 0.375, 0.001953)
    """
    n, k = only_before + only_after, min(only_before, only_after)
    tail = math.fsum(math.exp(_log_choose(n, i) - n * math.log(2)) for i in range(k + 1))
    return min(1.0, round(2 * tail, 12))


def _log_choose(n: int, i: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)


class _Table(NamedTuple):
    """What the scores of a resample are made of, image by image."""

    bin: NDArray[np.int64]
    gap: Values  # right or wrong, minus confidence
    means: Values  # 2×N, whose means are scores


def _table(answers: Predictions) -> _Table:
    inside = np.searchsorted(np.arange(1, BINS) / BINS, answers.confidence, side="left")  # closed on the right
    means = np.stack([answers.surprise, answers.distance])
    return _Table(inside.astype(np.int64), answers.correct - answers.confidence, means)


def _differences(before: _Table, after: _Table, counts: Values) -> Values:
    """ECE, NLL and Brier score, after − before, with image i counted `counts[i]` times."""
    return _scores(after, counts) - _scores(before, counts)


def _scores(table: _Table, counts: Values) -> Values:
    gaps = np.bincount(table.bin, counts * table.gap, BINS)
    surprise, distance = table.means @ counts
    sums: Values = np.array([np.abs(gaps).sum(), surprise, distance])
    return sums / float(counts.sum())


def _arrays(path: Path) -> tuple[NDArray[np.floating], NDArray[np.int64], Values | None]:
    try:
        check_sizes(path, {"output": "fiu", "target": "fiu"}, {"reservation": "fiu"})
        with np.load(path, allow_pickle=False) as stored:
            held = np.asarray(stored["reservation"], np.float64) if "reservation" in stored else None
            return np.asarray(stored["output"], np.float32), np.asarray(stored["target"], np.int64), held
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(
            f"{path} is damaged or holds no `output` and `target`: {str(error).splitlines()[0]};"
            " delete it and run `galago measure` again"
        ) from error


def check_sizes(path: Path, needed: Mapping[str, str], optional: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuses arrays that claim to be larger than what is stored, before memory is taken for them.

    Args:
        path: of an .npz file.
        needed: the arrays that it must hold, with the kinds of number that each may have.
        optional: likewise of arrays that it may hold.

    Raises:
        ValueError: an array claims too much, or is of another kind.
        KeyError: one is missing.
    """
    with zipfile.ZipFile(path) as archive:
        held = {name: kinds for name, kinds in optional.items() if f"{name}.npy" in archive.namelist()}
        for name, kinds in {**needed, **held}.items():
            with archive.open(f"{name}.npy") as member:
                version = npy.read_magic(member)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = read(member)
            claimed, stored = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size
            if claimed > min(stored, _LARGEST) or dtype.kind not in kinds:
                raise ValueError(f"{name}.npy claims {claimed} bytes of {dtype}")


def _judged(
    output: NDArray[np.floating], target: NDArray[np.int64], reservation: Values | None, path: Path
) -> Predictions | None:
    if output.ndim != 2 or not np.isfinite(output).all():  # no class scores, or a network that diverged
        return None
    images, classes = output.shape
    if reservation is not None:
        classes -= 1  # the last output is the reservation
        if reservation.shape != (images,) or not np.isfinite(reservation).all():
            raise UserError(
                f"{path}: `reservation` does not hold a number for each of the {images} outputs; measure it"
            )
    if not images or target.shape != (images,) or target.min() < 0 or target.max() >= classes:
        raise UserError(f"{path}: `target` does not hold the class of each of the {images} outputs; measure again")
    blocks = [_answers(output[i : i + _BLOCK], target[i : i + _BLOCK], classes) for i in range(0, images, _BLOCK)]
    answers = Predictions(target, *(np.concatenate(values) for values in zip(*blocks, strict=True)))
    return answers._replace(reservation=reservation)


def _answers(
    output: NDArray[np.floating], target: NDArray[np.int64], classes: int
) -> tuple[Values, Values, Values, Values]:
    """Confidence, correct, surprise and distance of some images, in float64, of the outputs that are classes."""
    logarithm = output.astype(np.float64)
    logarithm -= logarithm.max(1, keepdims=True)
    logarithm = (logarithm - np.log(np.exp(logarithm).sum(1, keepdims=True)))[:, :classes]
    probability, each = np.exp(logarithm), np.arange(len(target))
    predicted = logarithm.argmax(1)  # the lowest index on ties
    truth = probability[each, target]
    distance = (probability**2).sum(1) - 2 * truth + 1
    correct = (predicted == target).astype(np.float64)
    return probability[each, predicted], correct, -logarithm[each, target], distance
