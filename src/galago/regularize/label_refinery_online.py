"""SLR in a single training: each epoch some images are set aside, and the network says what their labels should be.

After Xi Fang, Jiancheng Yang, Bingbing Ni, "Stochastic Label Refinery: Toward Better Target Label Distribution", ICPR
2020, whose sub-trainings (`galago.regularize.label_refinery`) it saves.

Of each batch the first 1/V, which shuffling makes other images in every epoch, do not train the network; it predicts
them instead, and their targets move towards what it says, for all epochs to come.

    p̂_i = softmax(z_i / T) for i in the part that is set aside,  evaluation mode
    anchored:  q_i ← (1 - ρ) onehot(y_i) + ρ p̂_i,        free:  q_i ← (1 - ρ) q_i + ρ p̂_i
    L = - mean Σ_k q_ik log p_k over the rest of the batch

When: the refinery's R V trainings are too many. It costs a forward pass for 1/V of each batch, which in turn trains
nothing. The network has seen these images in other epochs, which makes it a kind of self-distillation: what it has
learned by heart it will not correct. List it first: what stands before it would get back a smaller batch than it gave.

Usual setting, the defaults: V = 5, ρ = 0.3, T = 1, from 30 % of the training on; all chosen here, as the form is.
Recipe: recipes/regularize/slr_online_resnet20_cifar10.yaml.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import device_of, evaluating
from galago.regularize.refined_targets import RefinedTargets, refined
from galago.taps import unnoticed
from galago.task import scores_of


class OnlineLabelRefinery(Method):
    """Refines targets while the network trains.

    Args:
        share: ρ, how far a target moves towards a prediction.
        folds: V; one image in so many is set aside.
        free: move from the last target rather than from the label.
        temperature: T, which divides the scores of predictions.
        start: share of the training that goes by before, in which nothing is set aside.
    """

    def __init__(
        self, share: float = 0.3, folds: int = 5, free: bool = False, temperature: float = 1.0, start: float = 0.3
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1 or not 0 <= start <= 1:
            raise UserError(f"OnlineLabelRefinery: share is {share:g} and start {start:g}; give numbers from 0 to 1")
        if folds < 2 or temperature <= 0:
            raise UserError(
                f"OnlineLabelRefinery: folds is {folds} and temperature {temperature:g}; give 2 or more and more than 0"
            )
        self.share, self.folds, self.free, self.temperature, self.start = share, folds, free, temperature, start
        self.kept = RefinedTargets("OnlineLabelRefinery")

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        if self.kept.rows is None:
            self.kept.rows = self.kept.empty(data, device_of(model))
        self.kept.to(device_of(model))
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        aside = max(len(batch.input) // self.folds, 1)
        if inner.progress < self.start or len(batch.input) <= aside:
            return inner(self.kept.looked_up(batch))
        self.remember(tree_map(lambda tensor: tensor[:aside], batch), inner.model)
        return inner(self.kept.looked_up(tree_map(lambda tensor: tensor[aside:], batch)))

    @torch.no_grad()
    def remember(self, batch: Batch, model: nn.Module) -> None:
        """Moves the targets of these images towards what the network says of them."""
        with evaluating(model), unnoticed():
            scores: Tensor = scores_of(model(batch.input)).float()
        before = self.kept.looked_up(batch).target if self.free else batch.target
        moved = refined(before, (scores / self.temperature).softmax(1), self.share)
        assert self.kept.rows is not None, "prepare comes first"
        self.kept.rows.index_copy_(0, self.kept.numbers(batch), moved.to(self.kept.rows.dtype))
