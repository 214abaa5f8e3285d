"""RankMixup: be surer of an image than of a mixture of two, and surer of a light mixture than of a heavy one.

Jongyoun Noh, Hyekang Park, Junghyup Lee, Bumsub Ham, "RankMixup: Ranking-Based Mixup Training for Network
Calibration", ICCV 2023, arXiv:2308.11990.

Labels of mixed images are a guess; the order of confidences is not. The network learns the task from the images as they
are, and from M mixtures of each only in which order its confidences should be. That keeps it from being sure of
everything.

    x̃_i = λ_i x + (1 - λ_i) x[π_i],   λ_i ~ Beta(α, α) one a batch,   i = 1 … M
    λ̂_i = max(λ_i, 1 - λ_i),  or 1 where both images have the same target;   conf = max_k softmax(z)_k
    MarginRanking (MRL)      mean_b 1[q_b ≠ q_π(b)] relu(max_k z̃_bk - max_k z_bk + m)
    GainRanking (M-NDCG)     DCG = Σ_r conf_(r) / log2(r + 1),   IDCG the same of λ̂:  first the image (λ̂ = 1), then
                             its mixtures by falling λ̂;     mean_b [1 - min(DCG, IDCG) / max(DCG, IDCG)]
    L = L_task + w L_ranking

When: probabilities have to be right without a correction afterwards, also near the classes' borders. `GainRanking` is
free of scale; a margin is in units of scores, which quantization and normalized classifiers change. All mixtures go
through the network in one further pass: training takes 1 + M times as long. The finished network is the plain one.
Compare it with a plain one after temperature scaling too (`galago.probes.temperature`), and see by
`galago.probes.mixed_confidence` what it learned.

Paper settings: w = 0.1; M = 3 with gain, M = 1 with a margin; α = 2 and m = 2 on CIFAR-10 (200 epochs, batch 128, SGD
at 0.1, a tenth from epochs 80 and 120 on, gradients clipped to 2), α = m = 1 on Tiny-ImageNet.

Recipe: recipes/regularize/rank_mixup_resnet20_cifar10.yaml.

Consequences worth knowing: as long as DCG < IDCG the gain pushes every confidence up, that of the image most. λ̂ is a
constant, gradients go through both sides of each comparison. With `update_norm` off, mixtures are normalized in use by
other numbers than while training: a small network on digits then kept hardly anything of the order. The released code
multiplies mask and margin of different images (all pairs of them); here each image has its own mask, as the paper's
formula says.

Chosen here: BatchNorm's running statistics count mixtures as the released code lets them, unless `update_norm` is off;
in either case a pass normalizes by its own batch. Two images have the same label where their targets are equal, so that
smoothed and mixed targets need no special case (λ̂ is about this mixing alone). Images are mixed as the model saw them,
whatever other methods did to them before or behind. A margin with several mixtures is averaged over them. Mixing
features instead of images is not offered. At w = 0 nothing is drawn and no pass is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.method import Forward, Method
from galago.mixing import draw_kept, draw_partners, require_shares
from galago.taps import unnoticed
from galago.task import require_probabilities, scores_of


def margin_ranking(scores: Tensor, mixed: Tensor, same: Tensor, margin: float) -> Tensor:
    """By how much each mixture's largest score is not `margin` below its image's; 0 for equal labels. M×B.

    Args:
        scores: z, of the images, B×K.
        mixed: z̃, of their mixtures, M×B×K.
        same: which mixtures are of two images with the same label, M×B.
        margin: m.

    >>> margin_ranking(torch.tensor([[4.0, 1.0]]), torch.tensor([[[3.0, 1.0]]]), torch.tensor([[False]]), 2.0)
    tensor([[1.]])
    """
    hinge = (mixed.amax(2) - scores.amax(1) + margin).relu()
    return hinge.masked_fill(same, 0)


def gain_ranking(scores: Tensor, mixed: Tensor, share: Tensor) -> Tensor:
    """1 minus the normalized discounted gain of each image and its mixtures. B numbers in [0, 1).

    Args:
        scores: z, of the images, B×K.
        mixed: z̃, of their mixtures, M×B×K.
        share: λ̂, M×B.

    >>> half = torch.tensor([[0.0, 0.0]])
    >>> gain_ranking(half, half[None], torch.tensor([[0.5]]))  # (0.5 + 0.5 / log2(3)) / (1 + 0.5 / log2(3))
    tensor([0.3801])
    """
    order = share.argsort(dim=0, descending=True, stable=True)
    confidence = torch.cat([_confidence(scores)[None], _confidence(mixed).gather(0, order)])
    relevance = torch.cat([torch.ones_like(share[:1]), share.gather(0, order)])
    discount = torch.arange(2, len(relevance) + 2, device=share.device, dtype=share.dtype).log2()[:, None]
    gain, ideal = (confidence / discount).sum(0), (relevance / discount).sum(0)
    return 1 - torch.where(ideal > gain, gain / ideal, ideal / gain)


def _confidence(scores: Tensor) -> Tensor:
    return scores.softmax(-1).amax(-1)


class Mixtures(NamedTuple):
    """What the network said of M mixtures of each of B images."""

    scores: Tensor  # M×B×K
    share: Tensor  # λ̂, M×B
    same: Tensor  # where both images of a mixture have the same target, M×B


class Ranking(ABC):
    """What it costs when confidences are not in the order of the mixtures."""

    @abstractmethod
    def __call__(self, scores: Tensor, mixtures: Mixtures) -> Tensor:
        """The loss, averaged over images, of the images' scores B×K and their mixtures. A scalar."""


class MarginRanking(Ranking):
    """MRL: each mixture's largest score lies a margin below that of its image.

    Args:
        margin: m, in units of scores; 2 on CIFAR-10, 1 on Tiny-ImageNet.
    """

    def __init__(self, margin: float = 2.0) -> None:
        if margin < 0:
            raise UserError(f"MarginRanking: margin is {margin:g}; give 0 or more, usually 2")
        self.margin = margin

    def __call__(self, scores: Tensor, mixtures: Mixtures) -> Tensor:
        return margin_ranking(scores, mixtures.scores, mixtures.same, self.margin).mean()


class GainRanking(Ranking):
    """M-NDCG: the list of an image and its mixtures has the gain that their mixing coefficients would have."""

    def __call__(self, scores: Tensor, mixtures: Mixtures) -> Tensor:
        return gain_ranking(scores, mixtures.scores, mixtures.share).mean()


class RankMixup(Method):
    """Keeps confidences of mixed images in the order of their mixing coefficients.

    Args:
        ranking: what a wrong order costs: `GainRanking` (M-NDCG) or `MarginRanking` (MRL).
        mixtures: M, of each image; 3 with gain, 1 with a margin.
        alpha: λ is drawn from Beta(alpha, alpha); 2 on CIFAR-10, 1 on Tiny-ImageNet.
        weight: of the ranking loss, w.
        update_norm: whether running statistics of BatchNorm count the mixtures.
    """

    def __init__(
        self,
        ranking: Ranking = GainRanking(),  # noqa: B008 - has no state
        mixtures: int = 3,
        alpha: float = 2.0,
        weight: float = 0.1,
        update_norm: bool = True,
    ) -> None:
        super().__init__()
        require_shares(alpha, 1.0, "RankMixup")
        if mixtures < 1:
            raise UserError(f"RankMixup: mixtures is {mixtures}; give 1 or more, usually 3")
        self.ranking, self.mixtures, self.alpha = ranking, mixtures, alpha
        self.weight, self.update_norm = weight, update_norm

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        if not self.weight:
            return step
        mixtures = self.mixed(inner.model, step.batch)
        ranking = self.ranking(scores_of(step.output).float(), mixtures)
        return step.add(mixup_ranking=self.weight * ranking)

    def mixed(self, model: nn.Module, batch: Batch) -> Mixtures:
        """What the model says of mixtures of a batch, in one pass."""
        target, image = require_probabilities(batch, "RankMixup"), batch.input
        partners = torch.stack([draw_partners(len(image)) for _ in range(self.mixtures)]).to(image.device)
        kept = draw_kept(self.alpha, self.mixtures).to(image.device, image.dtype)
        views = [share * image + (1 - share) * image[partner] for share, partner in zip(kept, partners, strict=True)]
        with unnoticed(), nullcontext() if self.update_norm else resting_statistics(model):
            scores = scores_of(model(torch.cat(views))).float()
        same = (target == target[partners]).all(2)
        share = torch.maximum(kept, 1 - kept).float()[:, None].expand(same.shape).masked_fill(same, 1)
        return Mixtures(scores.view(*same.shape, -1), share, same)


@contextmanager
def resting_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm layers that train normalize by their batch as ever, but keep their running statistics as they are."""
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.training]
    tracking = [norm for norm in norms if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True
