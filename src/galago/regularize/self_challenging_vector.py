"""RSC on vectors: self-challenging of the embedding that a classifier takes in, whatever the network in front of it.

Zeyi Huang, Haohan Wang, Eric P. Xing, Dong Huang, "Self-Challenging Improves Cross-Domain Generalization", ECCV 2020,
arXiv:2007.02454, as the DomainBed benchmark has it.

The entries of the embedding on which the true class's score relies most are set to zero, for the images that this hurts
most. It is `galago.regularize.self_challenging` without places and channels, so that it takes any network whose last
layer is linear: transformers, networks without an average.

    g = ∂(Σ_b z_(b,y_b)) / ∂f,   M = 0 where g >= the (1 - p) quantile of its row, else 1
    Δ = p_y(h(f)) - p_y(h(f M));   M stays where Δ >= the (1 - q) quantile of the batch, else M = 1
    L = L_task(h(f M), y)

When: as the other form, where that finds no map to mute. It costs two more passes of the last layer in each step.

Usual setting (DomainBed, and the defaults): p = q = 1/3. No recipe yet; put it in the place of the other form in
recipes of that.

Gradient, masks, Δ, loss and its gradient are checked against that benchmark's code. Chosen here: as in the other form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.layers import classifier, find
from galago.method import Forward, Method
from galago.regularize.muting import (
    Head,
    class_gradient,
    looking_ahead,
    lost_probability,
    uncompiled,
    unhook,
)
from galago.taps import Taps
from galago.task import require_probabilities, scores_of


def without_top(gradient: Tensor, share: float) -> Tensor:
    """M before images are chosen: 0 where g is at or above the (1 - p) quantile of its row, else 1; B×D.

    >>> without_top(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 0.5)
    tensor([[1., 1., 0., 0.]])
    """
    return (gradient < gradient.quantile(1 - share, dim=1, keepdim=True)).to(gradient.dtype)


def challenge(feature: Tensor, target: Tensor, head: Head, share: float, batch_share: float) -> Tensor:
    """The mask M that embeddings are multiplied by, B×D, constant.

    Args:
        feature: f, B×D.
        target: class probabilities B×K.
        head: from embeddings to scores, as it predicts.
        share: p, of the entries.
        batch_share: q, of the images.
    """
    feature = feature.detach().to(torch.promote_types(feature.dtype, torch.float32))
    mask = without_top(class_gradient(feature, target, head), share)
    with torch.no_grad():
        lost = lost_probability(feature, mask, target, head)
        return torch.where((lost >= lost.quantile(1 - batch_share)).unsqueeze(1), mask, 1.0)


class VectorSelfChallenging(Method):
    """Mutes the entries of the embedding that the true class relies on most; list it behind what changes the batch.

    Args:
        share: p, of the entries that are muted.
        batch_share: q, of the images of a batch that stay muted.
    """

    def __init__(self, share: float = 1 / 3, batch_share: float = 1 / 3) -> None:
        super().__init__()
        for name, value in (("share", share), ("batch_share", batch_share)):
            if not 0 < value <= 1:
                raise UserError(f"VectorSelfChallenging: {name} is {value:g}; give a share above 0 and at most 1")
        self.share, self.batch_share = share, batch_share
        self._target: Tensor | None = None  # while a step runs
        self._hook: Any = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Puts a hook in front of the classifier, which stays until training ends.

        Raises:
            UserError: the network has no linear layer.
        """
        self._hook = uncompiled(self._muted)
        find(model, classifier(model)).register_forward_pre_hook(self._hook)
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        self._target = require_probabilities(batch, "VectorSelfChallenging")
        try:
            return inner(batch)
        finally:
            self._target = None

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the hook away."""
        unhook(model, self._hook)
        return model

    def _muted(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The hook: what the classifier takes in, times M."""
        (feature,) = inputs
        if self._target is None or not module.training or Taps.resting:
            return inputs
        if len(self._target) != len(feature) or feature.ndim != 2:
            shape = "×".join(map(str, feature.shape))
            raise UserError(
                f"VectorSelfChallenging: the classifier takes in {shape} for {len(self._target)} images, not one row"
                " each; list methods that add images in front of it"
            )

        def answer(one: Tensor) -> Tensor:
            return scores_of(module.forward(one))  # without its hooks, of which this is one

        with looking_ahead([module], feature.device):
            mask = challenge(
                feature, self._target, lambda f: scores_of(module.forward(f)), self.share, self.batch_share
            )
        return (feature * mask.to(feature.dtype),)
