"""Several answers of a network that draws noise: how much they differ, and what their mean is worth.

A network with noise inside (`galago.distill.noise_injection`) answers otherwise each time. Each image is shown `draws`
times; the formulas of the mean and of the two measures of doubt are in `galago.draws`.

    draws_accuracy_mean, draws_accuracy_std   of single answers: mean and standard deviation over the passes
    draws_accuracy                            of the averaged probabilities
    draws_entropy                             mean entropy of the averaged probabilities, in nats
    draws_variance                            mean variance of the probabilities, summed over the classes

When to use it: beside accuracy, wherever noise is on when the network predicts; the standard deviation says how much of
a difference between two such networks is chance. It costs `draws` passes over the test images. A network without noise
has a standard deviation and a variance of 0.

Design choice: the standard deviation divides by the number of passes, not by one less.
"""

from __future__ import annotations

from torch import nn

from galago.data import Data
from galago.draws import asked, entropy, log_mean_probability, variance
from galago.errors import UserError
from galago.probe import Probe
from galago.task import Task


class Draws(Probe):
    """Accuracy of single and averaged answers on the test images, and how far the answers disagree.

    Args:
        draws: how often each image is shown.
    """

    def __init__(self, draws: int = 10) -> None:
        if draws < 1:
            raise UserError(f"Draws: draws is {draws}; give 1 or more, usually 10")
        self.draws = draws

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        passes = asked(deployed, data.test(), self.draws)
        scores, target = passes.output, passes.target.argmax(1)
        right = (scores.argmax(2) == target).double()
        mean = log_mean_probability(scores)
        return {
            "draws_accuracy_mean": float(right.mean()),
            "draws_accuracy_std": float(right.mean(1).std(correction=0)),
            "draws_accuracy": float((mean.argmax(1) == target).double().mean()),
            "draws_entropy": float(entropy(scores).mean()),
            "draws_variance": float(variance(scores).mean()),
        }
