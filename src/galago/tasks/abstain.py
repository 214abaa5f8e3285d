"""Deep gamblers: a classifier with one output more, which stands for "I do not know".

Liu Ziyin, Zhikang Wang, Paul Pu Liang, Ruslan Salakhutdinov, Louis-Philippe Morency, Masahito Ueda, "Deep Gamblers:
Learning to Abstain with Portfolio Theory", NeurIPS 2019, arXiv:1907.00208; with an adjusted teacher
(`galago.distill.adjust`) it is Xu Yi, Jian Pu, Hui Zhao, "Knowledge Distillation with a Precise Teacher and Prediction
with Abstention", ICPR 2020 (no public code).

The network bets on m classes at the pay-off o and may hold a part of its stake back. What it holds back, the
reservation, ranks images by how little it knows of them; the prediction is always one of the m classes.

    f = softmax(u) over all m + 1 scores,   f_{m+1} the reservation
    L = - mean Σ_{i ≤ m} q_i log(f_i + f_{m+1} / o)           for a label y: -log(f_y + f_{m+1} / o)

The least loss for given class probabilities q has a closed form (`optimal_bets`): f_i = q_i - f_{m+1} / o for the
likeliest classes and 0 for the rest. It holds everything back where no class is likelier than 1 / o; at o ≥ m it never
holds anything back, and at o ≤ 1 it never bets.

When: somebody can look at the images that the network leaves. Choose a threshold for the reservation on validation
images, for the share of images that it is to answer (`galago.probes.selective`), and again after quantization. It costs
one output. Build the model with m + 1 outputs; the data have m classes.

Usual setting: the official code for CIFAR-10 has o = 2.2 by default, tries several and chooses for every coverage, and
below o = 6.1 trains 100 of 300 epochs with cross-entropy on the first m scores, for the loss alone may learn to hold
everything back. The defaults are design choices: o = 0.6 m, and a third of the training with cross-entropy below that;
softened targets need it at larger pay-offs too.

Recipe: recipes/distill/gambler_resnet20_cifar10.yaml, and with a teacher recipes/distill/abstain_resnet20_cifar10.yaml.

Chosen here: targets are class probabilities, so mixed and softened labels need no loss of their own; the soft form is a
design choice, for the second paper's own could not be had. What a user sees are the m class probabilities f_i as they
are: they add up to 1 minus the reservation. They are modest by design, since a bet is a class's probability minus
f_{m+1} / o: compare their calibration with that of another gambler only. Where an output is a dict, `main` counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from galago.batch import Batch
from galago.errors import UserError
from galago.task import Task, scores_of
from galago.tasks.classify import TopAccuracy


def gambler_loss(scores: Tensor, target: Tensor, payoff: float) -> Tensor:
    """`-Σ_i q_i log(f_i + f_{m+1} / o)`, averaged over the batch. A scalar.

    Args:
        scores: u, N×(m+1), the last of the reservation.
        target: q, class probabilities N×m.
        payoff: o.

    >>> gambler_loss(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]]), 2.0)
    tensor(0.6009)
    """
    log_f = scores.log_softmax(1)
    log_returns = torch.logaddexp(log_f[:, :-1], log_f[:, -1:] - math.log(payoff))
    return -(target * log_returns).sum(1).mean()


def optimal_bets(target: Tensor, payoff: float) -> tuple[Tensor, Tensor]:
    """Where the loss is least: the bets f, N×m, and the reservation f_{m+1}, N.

    From the likeliest class on, class i is bet on while q_i o > r; with k classes of probability P together, the
    reservation is r = (1 - P) / (1 - k / o), and nothing for k ≥ o.

    Args:
        target: q, class probabilities N×m.
        payoff: o.

    >>> f, reservation = optimal_bets(torch.tensor([[0.55, 0.25, 0.1, 0.06, 0.04]]), 2.5)
    >>> f[0, 0], reservation
    (tensor(0.2500), tensor([0.7500]))
    """
    ordered, order = target.sort(1, descending=True)
    count = torch.arange(target.shape[1] + 1, dtype=target.dtype, device=target.device)
    left = 1 - nn.functional.pad(ordered.cumsum(1), (1, 0))
    held = torch.where(count < payoff, left.clamp_min(0) / (1 - count / payoff), 0.0)
    chosen = (ordered * payoff > held[:, :-1]).cumprod(1)
    reservation = held.gather(1, chosen.sum(1, keepdim=True))
    bets = chosen * (ordered - reservation / payoff)
    return torch.zeros_like(target).scatter(1, order, bets), reservation[:, 0]


class ClassifyOrAbstain(Task):
    """Bets on classes and may hold back; the model has one output more than there are classes, the last.

    Args:
        classes: how many; m.
        payoff: o, between 1 and m: the smaller, the more is held back. 0.6 m where none is given.
        pretraining: share of the training with cross-entropy on the classes alone. Where none is given, a third for
            pay-offs below 0.6 m and nothing otherwise.
    """

    def __init__(self, classes: int, payoff: float | None = None, pretraining: float | None = None) -> None:
        super().__init__()
        usual = 0.6 * classes
        self.classes, self.payoff = classes, usual if payoff is None else payoff
        needed = 1 / 3 if self.payoff < usual else 0.0
        self.pretraining = needed if pretraining is None else pretraining
        if not 1 < self.payoff < classes:
            raise UserError(
                f"ClassifyOrAbstain: payoff is {self.payoff:g}; give a number above 1 (or it never answers) and below"
                f" {classes}, the number of classes (or it never abstains); {usual:g} is usual"
            )
        if not 0 <= self.pretraining <= 1:
            raise UserError(
                f"ClassifyOrAbstain: pretraining is {self.pretraining}; give a share of the training, 0 to 1"
            )

    def at(self, progress: float) -> Task:
        """Cross-entropy alone as long as the pretraining lasts."""
        return _Pretraining(self.classes, self.payoff) if progress < self.pretraining else self

    def losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """`gambler`, averaged over the batch; targets are probabilities N×m."""
        return {"gambler": gambler_loss(self.scores(output).float(), batch.target, self.payoff)}

    def decode(self, output: Any) -> Tensor:
        """Class probabilities N×m, which add up to 1 minus the reservation."""
        return self.scores(output).softmax(1)[:, :-1]

    def decisions(self, output: Any) -> Tensor:
        """The most likely class, N; never the reservation."""
        return self.scores(output)[:, :-1].argmax(1)

    def reservation(self, output: Any) -> Tensor:
        """f_{m+1}, N numbers in [0, 1]: reject what lies above a threshold."""
        return self.scores(output).softmax(1)[:, -1]

    def metrics(self) -> MetricCollection:
        """`accuracy` in [0, 1], of all images, reserved or not."""
        return MetricCollection({"accuracy": TopAccuracy()})

    def scores(self, output: Any) -> Tensor:
        """u, N×(m+1).

        Raises:
            UserError: the model has another number of outputs.
        """
        scores = scores_of(output)
        if scores.shape[1] != self.classes + 1:
            raise UserError(
                f"ClassifyOrAbstain: the model has {scores.shape[1]} outputs, but {self.classes} classes need"
                f" {self.classes + 1}, the last to abstain; build it with model.init_args.classes: {self.classes + 1}"
            )
        return scores


class _Pretraining(ClassifyOrAbstain):
    """The same before it may abstain."""

    def __init__(self, classes: int, payoff: float) -> None:
        super().__init__(classes, payoff, 0.0)

    def losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """`cross_entropy` on the classes' scores, averaged over the batch."""
        return {"cross_entropy": nn.functional.cross_entropy(self.scores(output)[:, :-1], batch.target)}
