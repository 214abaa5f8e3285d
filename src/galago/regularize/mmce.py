"""MMCE: a calibration error that has a gradient, added to the loss.

Aviral Kumar, Sunita Sarawagi, Ujjwal Jain, "Trainable Calibration Measures for Neural Networks from Kernel Mean
Embeddings", ICML 2018.

Confidence and correctness of a batch are compared without bins: images of similar confidence r are taken together by a
kernel, and where they are wrong more often than they say, all of their confidences are pulled down.

    r = max_k softmax(z)_k,   c = 1[right]
    L = L_task + w (1 / B²) Σ_ij (c_i - r_i) (c_j - r_j) exp(-|r_i - r_j| / 0.4)

When: a network trained from scratch whose probabilities are used as they are. It costs B² products a step. It needs
batches that hold wrong answers too: a network that gets all training images right is told to be surer. Compare with a
plain network after temperature scaling (`galago.probes.temperature`).

Usual setting: w = 1 with this squared form, as in the comparisons of RankMixup (ICCV 2023). Recipe:
recipes/regularize/mmce_resnet20_cifar10.yaml.

Chosen here: all pairs count, an image with itself too, and no square root is taken (some versions take it). Correctness
is a constant. With mixed and soft targets it is the probability that the target gives to the predicted class, which is
0 or 1 for a label. Each process of several compares its own batch.
"""

from __future__ import annotations

from torch import Tensor

from galago.batch import Batch, Step
from galago.method import Forward, Method
from galago.regularize.scores import scores_and_targets

WIDTH = 0.4  # of the kernel


def kernel_error(confidence: Tensor, correct: Tensor) -> Tensor:
    """The squared distance between confidence and correctness, as the kernel sees it. A scalar, 0 or more.

    Args:
        confidence: r, N numbers in [0, 1].
        correct: c, N numbers in [0, 1], constants.

    >>> import torch
    >>> kernel_error(torch.tensor([0.9, 0.5]), torch.tensor([1.0, 0.0]))  # (0.01 + 0.25 - 2 * 0.05 / e) / 4
    tensor(0.0558)
    """
    gap = correct - confidence
    kernel = (-(confidence[:, None] - confidence).abs() / WIDTH).exp()
    return (gap[:, None] * gap * kernel).mean()


class MMCE(Method):
    """Adds the maximum mean calibration error to the loss.

    Args:
        weight: w.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        scores, target = scores_and_targets(step, "MMCE")
        confidence, predicted = scores.softmax(1).max(1)
        correct = target.gather(1, predicted[:, None])[:, 0]
        return step.add(mmce=self.weight * kernel_error(confidence, correct))
