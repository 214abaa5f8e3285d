"""Selective prediction: how often is a network wrong, if it may leave out the images that it is least sure of?

El-Yaniv, Wiener, "On the Foundations of Noise-free Selective Classification", JMLR 11, 2010 (risk and coverage);
Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks", NIPS 2017, arXiv 1705.08500; Geifman, Uziel,
El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019, arXiv 1805.08206 (area under the
curve).

The N images are sorted from the most certain to the least. Of the first i a share r_i is wrong:

    r_i = (1 / i) Σ_{j ≤ i} 1[wrong_j]      selective error at coverage c: r_{round(c N)}      AURC = (1 / N) Σ_i r_i

Three ways to rank: by the reservation, where the task has one (`galago.tasks.abstain`); by confidence, 1 minus the
largest class probability (MSP); by the entropy of the class probabilities. A ranking that tells nothing has an AURC of
the error rate r̂, a perfect one of about r̂ + (1 - r̂) ln(1 - r̂).

When to use it: somebody or something else can take the images that are left out. Numbers of two networks can be
compared as they are; of two rankings of one network, too. For use, choose a threshold on validation images
(`threshold`), and anew after quantization.

Chosen where sources differ: sorting is stable, so equal uncertainties keep the order of the images; rounding is to the
even neighbor; at least one image is kept; AURC is the plain mean, not a trapezoidal rule. All in float64. With a
reservation, confidence and entropy are those of the classes alone, made to add up to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galago.errors import UserError
from galago.probe import OutputProbe, Outputs
from galago.task import Task

COVERAGES = (100, 99, 98, 97, 95, 90, 85, 80, 75, 70, 60, 50, 40, 30, 20, 10)


def risks(uncertainty: Tensor, correct: Tensor) -> Tensor:
    """r_1 … r_N, float64: the share of wrong answers among the i most certain.

    Args:
        uncertainty: N.
        correct: N, 1 where the answer was right.

    >>> risks(torch.tensor([0.3, 0.1, 0.2]), torch.tensor([0, 1, 1]))
    tensor([0.0000, 0.0000, 0.3333], dtype=torch.float64)
    """
    wrong = 1 - correct.double()[uncertainty.double().argsort(stable=True)]
    return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)


def kept(coverage: float, images: int) -> int:
    """How many images are answered at a coverage in percent: at least one.

    >>> kept(90, 45), kept(70, 45), kept(10, 3)
    (40, 31, 1)
    """
    return max(1, round(coverage / 100 * images))


def area(risk: Tensor) -> float:
    """AURC, of r_1 … r_N."""
    return float(risk.mean())


def threshold(uncertainty: Tensor, coverage: float) -> float:
    """The largest uncertainty that is still answered at a coverage in percent; reject what lies above it.

    >>> round(threshold(torch.tensor([0.3, 0.1, 0.2, 0.9]), 75), 6)
    0.3
    """
    ordered = uncertainty.double().sort().values
    return float(ordered[kept(coverage, len(ordered)) - 1])


def entropy(probabilities: Tensor) -> Tensor:
    """Of each row N×K, in nats."""
    found: Tensor = torch.special.entr(probabilities).sum(1)
    return found


class Selective(OutputProbe):
    """`aurc_…` and `selective_error_{percent}_…` by `reservation` (where there is one), `confidence` and `entropy`.

    Args:
        coverages: in percent of the images.
    """

    def __init__(self, coverages: Sequence[float] = COVERAGES) -> None:
        if wrong := [coverage for coverage in coverages if not 0 < coverage <= 100]:
            raise UserError(f"Selective: coverages has {wrong[0]:g}; give percentages above 0, at most 100")
        self.coverages = list(coverages)

    def curves(self, outputs: Outputs, task: Task) -> dict[str, Tensor]:
        """r_1 … r_N by ranking, for a plot."""
        decoded: Tensor = task.decode(outputs.output.double())
        correct = decoded.argmax(1) == outputs.target.argmax(1)
        ranked = uncertainties(decoded, task.reservation(outputs.output.double()))
        return {name: risks(uncertainty, correct) for name, uncertainty in ranked.items()}

    def score(self, outputs: Outputs, task: Task) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, risk in self.curves(outputs, task).items():
            numbers[f"aurc_{name}"] = area(risk)
            for coverage in self.coverages:
                numbers[f"selective_error_{coverage:g}_{name}"] = float(risk[kept(coverage, len(risk)) - 1])
        return numbers


def uncertainties(probabilities: Tensor, reservation: Tensor | None) -> dict[str, Tensor]:
    """N numbers for each ranking, larger for images to leave out first.

    Args:
        probabilities: of the classes, N×K, float64.
        reservation: N, what is missing of them to 1; none where nothing is.
    """
    held = {} if reservation is None else {"reservation": reservation}
    if reservation is not None:
        tiny = torch.finfo(probabilities.dtype).tiny
        probabilities = probabilities / probabilities.sum(1, keepdim=True).clamp_min(tiny)
    return held | {"confidence": 1 - probabilities.max(1).values, "entropy": entropy(probabilities)}
