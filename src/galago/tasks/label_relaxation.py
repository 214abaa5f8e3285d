"""Label relaxation: a label says that its class is likely, not how likely exactly.

Julian Lienen, Eyke Hüllermeier, "From Label Smoothing to Label Relaxation", AAAI 2021 (recalled).

Label smoothing replaces a label by one distribution, which is as wrong as the label itself. Relaxation replaces it by a
set: all distributions that give the class at least 1 - α. A prediction inside the set costs nothing; outside it costs
its distance to the nearest member.

    Q = {q' : q'_k ≥ (1 - α) q_k}         L = mean min_{q' ∈ Q} KL(q' ‖ p),   p = softmax(z)
    for a label y, where p_y < 1 - α:     (1 - α) log((1 - α) / p_y) + α log(α / (1 - p_y));   otherwise 0

When: an over-confident classifier that label smoothing makes under-confident, or a teacher: what a network says of the
other classes is left alone, where smoothing flattens it. It costs nothing to speak of. Training images that are within
α teach nothing anymore.

Usual setting: α by validation; the default 0.1 is a design choice, that of label smoothing. Recipe:
recipes/regularize/label_relaxation_resnet20_cifar10.yaml.

Chosen here: the paper has labels only. For mixed and soft targets the set is the one above, which asks 1 - α of each
class's own probability and is the paper's for a label; its nearest member is max((1 - α) q, c p), with the c for which
it adds up to 1. That member is a constant for the gradient, which changes nothing, for it is where the distance is
least. At α = 0 the loss is the cross-entropy minus the target's own entropy, which is 0 for a label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galago.batch import Batch
from galago.errors import UserError
from galago.task import scores_of
from galago.tasks.classify import Classify


def nearest(p: Tensor, target: Tensor, alpha: float) -> Tensor:
    """The member of Q with the least `KL(q' ‖ p)`, N×K.

    Classes are freed from their bound in the order of p / q, and c is the least that any number of free ones asks for.

    Args:
        p: class probabilities of the network, N×K.
        target: q, class probabilities N×K.
        alpha: α.

    >>> nearest(torch.tensor([[0.5, 0.3, 0.2], [0.95, 0.03, 0.02]]), torch.eye(3)[[0, 0]], 0.1)
    tensor([[0.9000, 0.0600, 0.0400],
            [0.9500, 0.0300, 0.0200]])
    """
    bound, tiny = (1 - alpha) * target, torch.finfo(p.dtype).tiny
    order = (p / bound.clamp_min(tiny)).argsort(dim=1, descending=True, stable=True)
    free_p, free_bound = (values.gather(1, order).cumsum(1) for values in (p, bound))
    left = 1 - bound.sum(1, keepdim=True) + free_bound
    c = (left / free_p.clamp_min(tiny)).amin(1, keepdim=True)
    return torch.maximum(bound, c * p)


def relaxed_loss(scores: Tensor, target: Tensor, alpha: float) -> Tensor:
    """`min KL(q' ‖ p)` over all q' in Q, averaged over the batch. A scalar.

    Args:
        scores: z, N×K.
        target: q, class probabilities N×K.
        alpha: α.

    >>> relaxed_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 0.1)  # 0.9 ln 1.8 + 0.1 ln 0.2
    tensor(0.3681)
    """
    log_p = scores.log_softmax(1)
    q = nearest(log_p.detach().exp(), target, alpha)
    divergence: Tensor = torch.special.xlogy(q, q) - q * log_p
    return divergence.sum(1).mean()


class LabelRelaxation(Classify):
    """Classification by label relaxation.

    Args:
        classes: how many.
        alpha: α, what a prediction may keep from its target for nothing.
    """

    def __init__(self, classes: int, alpha: float = 0.1) -> None:
        super().__init__(classes)
        if not 0 <= alpha < 1:
            raise UserError(f"LabelRelaxation: alpha is {alpha:g}; give a share from 0 to less than 1, usually 0.1")
        self.alpha = alpha

    def losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """`label_relaxation`, averaged over the batch; targets are probabilities N×K."""
        return {"label_relaxation": relaxed_loss(scores_of(output).float(), batch.target, self.alpha)}
