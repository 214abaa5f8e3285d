"""Out-of-distribution detection: does a network's answer tell that an image is of none of its classes?

MSP: Dan Hendrycks, Kevin Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
Networks", ICLR 2017, arXiv:1610.02136. Largest score: Hendrycks et al., "Scaling Out-of-Distribution Detection for
Real-World Settings", ICML 2022, arXiv:1911.11132. Energy: Weitang Liu, Xiaoyun Wang, John Owens, Yixuan Li,
"Energy-based Out-of-distribution Detection", NeurIPS 2020, arXiv:2010.03759. All recalled, with the formulas of public
code.

Each image gets one number from its class scores z, higher for images that look like those of training; test images are
told by it from images of other sets (`galago.outside`). The figures are those of `galago.probes.detection`.

    msp        max_k softmax(z)_k                 max_logit   max_k z_k
    energy     τ log Σ_k exp(z_k / τ)             entropy     Σ_k p_k log p_k,  p = softmax(z)
    reservation    1 - what the task holds back, where it does (`galago.tasks.abstain`)

    auroc_{score}_{set}, fpr95_{score}_{set}      and means over the sets: auroc_{score}_mean, fpr95_…,
    fpr95_ood_positive_…, aupr_in_…, aupr_out_…, detection_error_…

When: the network will see what it was not trained on. It costs a pass over each set, and works on exported files: low
bits change scores, so measure the file. Energy and the largest score hang on the scale of the scores: never compare
their values across networks, and choose thresholds (`galago.probes.detection.threshold`) on validation images, anew
after quantization. The images are test images: choose nothing by these numbers.

Usual setting, the defaults: MSP, and energy at τ = 1. Noise is the easiest outside there is and a network may do well
on it by accident; name natural images that your users might take (`galago.outside.OtherData`). No recipe of its own.

Chosen here: where a task holds back, all scores but its own are those of the classes alone. All in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from galago.data import Data, Loader
from galago.errors import UserError
from galago.outside import Outside
from galago.outside_made_up import chosen
from galago.probe import TEST, Outputs, ViewsProbe
from galago.probes.detection import numbers
from galago.task import Task, class_scores


def maximum_softmax(z: Tensor) -> Tensor:
    """`max_k softmax(z)_k`: N numbers of class scores N×K.

    >>> maximum_softmax(torch.zeros(1, 4))
    tensor([0.2500])
    """
    return z.softmax(1).max(1).values


def energy(z: Tensor, temperature: float = 1.0) -> Tensor:
    """`τ log Σ_k exp(z_k / τ)`, the energy with its sign changed: N numbers of class scores N×K.

    >>> energy(torch.tensor([[2.0, 1.0, 0.0]]))
    tensor([2.4076])
    """
    found: Tensor = temperature * (z / temperature).logsumexp(1)
    return found


def negative_entropy(z: Tensor) -> Tensor:
    """`Σ_k p_k log p_k` with p = softmax(z), in nats: N numbers of class scores N×K.

    >>> negative_entropy(torch.zeros(1, 2))
    tensor([-0.6931])
    """
    found: Tensor = -torch.special.entr(z.softmax(1)).sum(1)
    return found


class Score(ABC):
    """One number an image, higher for images that look like those of training.

    Attributes:
        name: a part of the numbers' names.
    """

    name: str

    @abstractmethod
    def __call__(self, output: Tensor, task: Task) -> Tensor:
        """N numbers of raw outputs N×…"""


class MaximumSoftmax(Score):
    """`msp`, the probability of the most likely class."""

    name = "msp"

    def __call__(self, output: Tensor, task: Task) -> Tensor:
        return maximum_softmax(class_scores(output, task))


class MaximumLogit(Score):
    """`max_logit`, the largest class score."""

    name = "max_logit"

    def __call__(self, output: Tensor, task: Task) -> Tensor:
        return class_scores(output, task).max(1).values


class Energy(Score):
    """`energy`, a smooth form of the largest class score.

    Args:
        temperature: τ; other than 1, it is a part of the name.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise UserError(f"Energy: temperature is {temperature:g}; give a number above 0, 1 is usual")
        self.temperature = temperature
        self.name = "energy" if temperature == 1 else f"energy_{temperature:g}"

    def __call__(self, output: Tensor, task: Task) -> Tensor:
        return energy(class_scores(output, task), self.temperature)


class NegativeEntropy(Score):
    """`entropy`, of the class probabilities, with its sign changed."""

    name = "entropy"

    def __call__(self, output: Tensor, task: Task) -> Tensor:
        return negative_entropy(class_scores(output, task))


class Reservation(Score):
    """`reservation`, what a task that may abstain does not hold back."""

    name = "reservation"

    def __call__(self, output: Tensor, task: Task) -> Tensor:
        held = task.reservation(output)
        if held is None:
            raise UserError(f"Reservation: {type(task).__name__} always answers; take another score, such as Energy")
        return 1 - held


class OutOfDistribution(ViewsProbe):
    """How well outputs tell test images from images of other sets, as `auroc_energy_uniform`.

    Args:
        outside: sets of other images; None for five made-up ones.
        scores: by which numbers they are told apart; None for MSP and energy.
    """

    def __init__(self, outside: Sequence[Outside] | None = None, scores: Sequence[Score] | None = None) -> None:
        self.outside = chosen(outside, "OutOfDistribution")
        self.scores = [MaximumSoftmax(), Energy()] if scores is None else list(scores)
        names = [one.name for one in self.scores]
        if not names or len(set(names)) < len(names):
            raise UserError(f"OutOfDistribution: scores are {names}; name at least one, and each once")

    def views(self, data: Data) -> dict[str, Loader]:
        return {TEST: data.test()} | {one.view: one.test(data) for one in self.outside}

    def score(self, outputs: Mapping[str, Outputs], task: Task) -> dict[str, float]:
        found: dict[str, float] = {}
        for score in self.scores:
            inside = score(outputs[TEST].output.double(), task)
            others = {one.name: score(outputs[one.view].output.double(), task) for one in self.outside}
            found |= numbers(score.name, inside, others)
        return found
