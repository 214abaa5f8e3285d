"""Margin-based label smoothing: scores may differ, but not by more than a margin.

Bingyuan Liu, Ismail Ben Ayed, Adrian Galdran, Jose Dolz, "The Devil is in the Margin: Margin-based Label Smoothing for
Network Calibration", CVPR 2022, arXiv:2111.15430.

Label smoothing and focal loss pull all scores of an image together, however close they are. This term leaves them alone
as long as none lies more than m below the largest, so that accuracy is kept and confidence is bounded.

    L = L_task + w mean_{b,k} relu(max_c z_bc - z_bk - m)

When: the first to try among calibration losses that cost nothing. The most that a network may say for nothing is
1 / (1 + (K - 1) exp(-m)), 0.978 for ten classes and m = 6. m is in units of scores: a normalized classifier needs
another. Compare with a plain network after temperature scaling
(`galago.probes.temperature`).

Usual setting: w = 0.1; m = 6 in the comparisons of RankMixup (ICCV 2023), 10 by default in the paper's own code.
Recipe: recipes/regularize/margin_resnet20_cifar10.yaml.

Chosen here: the mean is over all N·K entries, the largest score's own zero included; the gradient also goes through the
largest score. Targets do not enter, so that mixed and soft ones need nothing special.
"""

from __future__ import annotations

from torch import Tensor

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.method import Forward, Method
from galago.task import scores_of


def excess(scores: Tensor, margin: float) -> Tensor:
    """By how much scores lie further than a margin below the largest, averaged over images and classes. A scalar.

    Args:
        scores: z, N×K.
        margin: m.

    >>> import torch
    >>> excess(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), 1.0)  # (0 + 0 + 1 + 2 + 1 + 0) / 6
    tensor(0.6667)
    """
    return (scores.amax(1, keepdim=True) - scores - margin).relu().mean()


class MarginSmoothing(Method):
    """Adds what scores differ by beyond a margin to the loss (MbLS).

    Args:
        margin: m, in units of scores; 6 to 10.
        weight: w.
    """

    def __init__(self, margin: float = 6.0, weight: float = 0.1) -> None:
        super().__init__()
        if margin < 0:
            raise UserError(f"MarginSmoothing: margin is {margin:g}; give 0 or more, usually 6")
        self.margin, self.weight = margin, weight

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        return step.add(margin=self.weight * excess(scores_of(step.output).float(), self.margin))
