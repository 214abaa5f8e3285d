"""MDCA: over a batch, each class is predicted with as much probability as it is there.

Ramya Hebbalaguppe, Jatin Prakash, Neelabh Madan, Chetan Arora, "A Stitch in Time Saves Nine: A Train-Time Regularizing
Loss for Improved Neural Network Calibration", CVPR 2022, arXiv:2203.13834.

For each class, the mean of its probability over the batch is compared with how often the batch holds it. Unlike most
terms, it looks at all classes' probabilities and not only at that of the answer.

    L = L_task + w (1 / K) Σ_k |mean_b softmax(z_b)_k - mean_b q_bk|

When: every class's probability matters (class-wise calibration error), and data whose classes are unequally frequent.
It costs nothing. Batches should hold many images for the number of classes: with few, a class's share of a batch is
mostly chance. Often used with focal loss (`galago.tasks.focal`).

Usual setting: w = 1, with cross-entropy. Recipe: recipes/regularize/mdca_resnet20_cifar10.yaml.

Chosen here: the task's own loss sees scores; a released configuration feeds softmax outputs into a cross-entropy, which
takes the softmax twice. Mixed and soft targets need nothing special: q is their mean. Each process of several compares
its own batch.
"""

from __future__ import annotations

from torch import Tensor

from galago.batch import Batch, Step
from galago.method import Forward, Method
from galago.regularize.scores import scores_and_targets


def class_gap(probabilities: Tensor, target: Tensor) -> Tensor:
    """How far the classes' mean probabilities are from their shares of the batch, averaged over classes. A scalar.

    Args:
        probabilities: p, N×K.
        target: q, class probabilities N×K.

    >>> import torch
    >>> class_gap(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.eye(2))
    tensor(0.3000)
    """
    return (probabilities.mean(0) - target.mean(0)).abs().mean()


class MDCA(Method):
    """Adds the difference between mean confidence and frequency of each class to the loss.

    Args:
        weight: w.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        scores, target = scores_and_targets(step, "MDCA")
        return step.add(mdca=self.weight * class_gap(scores.softmax(1), target))
