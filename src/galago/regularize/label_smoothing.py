"""Label smoothing: never ask a network to be quite certain.

Christian Szegedy, Vincent Vanhoucke, Sergey Ioffe, Jonathon Shlens, Zbigniew Wojna, "Rethinking the Inception
Architecture for Computer Vision", CVPR 2016, arXiv:1512.00567, section 7.

A little of each target's probability is spread evenly over all K classes, so that the loss is smallest at finite
scores. The network becomes less confident, and often a little more accurate.

    q ← (1 - ε) q + ε / K

When: classifiers trained for long on clean labels. It costs nothing. An over-confident network becomes better
calibrated, an under-confident one worse; a network trained with it has been reported to make a weaker teacher
(Müller et al. 2019, arXiv:1906.02629), so prefer a teacher without.

Paper setting: ε = 0.1 on ImageNet. Recipe: recipes/regularize/label_smoothing_resnet20_cifar10.yaml.

Chosen here: it acts on the target like any other method, so it smooths mixed labels too; before or after `CutMix` and
`Mixup` is the same, because both are linear.
"""

from __future__ import annotations

from torch import Tensor

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.method import Forward, Method
from galago.task import require_probabilities


def smooth(target: Tensor, epsilon: float) -> Tensor:
    """Class probabilities N×K moved towards the uniform distribution.

    >>> import torch
    >>> smooth(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 0.4)
    tensor([[0.7000, 0.1000, 0.1000, 0.1000]])
    """
    return (1 - epsilon) * target + epsilon / target.shape[1]


class LabelSmoothing(Method):
    """Spreads a little of every target over all classes.

    Args:
        epsilon: how much is spread, from 0 (nothing) to 1 (all of it).
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        super().__init__()
        if not 0 <= epsilon <= 1:
            raise UserError(f"LabelSmoothing: epsilon is {epsilon}; give a number from 0 to 1, usually 0.1")
        self.epsilon = epsilon

    def step(self, batch: Batch, inner: Forward) -> Step:
        target = require_probabilities(batch, "LabelSmoothing")
        return inner(batch._replace(target=smooth(target, self.epsilon)))
