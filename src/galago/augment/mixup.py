"""Mixup: train on weighted averages of two images and of their labels.

Hongyi Zhang, Moustapha Cissé, Yann N. Dauphin, David Lopez-Paz, "mixup: Beyond Empirical Risk Minimization",
ICLR 2018, arXiv:1710.09412.

Each image becomes a weighted average of itself and another image of its batch, and so does its label; the network
learns to answer linearly between training examples.

    λ ~ Beta(α, α)
    x ← λ x + (1 - λ) x[π]
    q ← λ q + (1 - λ) q[π]

When: classifiers that are too sure of themselves or trained on few images. It costs one pass over the batch. Averaged
images have values that real images have not, so ranges of quantizers are better set on clean images; `CutMix` does not
have that effect.

Paper settings: α = 1 on CIFAR, 0.2 on ImageNet (0.1 to 0.4 were good there). As in the paper's experiments, one λ a
batch, and the partner comes from the same batch. Recipe: recipes/regularize/mixup_resnet20_cifar10.yaml.

Chosen here: `probability`, to leave some batches as they are or to alternate with `CutMix`; the paper mixes all.
"""

from __future__ import annotations

import torch

from galago.batch import Batch, Step
from galago.method import Forward, Method
from galago.mixing import average, draw_kept, draw_partners, mix_targets, require_shares
from galago.task import require_probabilities


class Mixup(Method):
    """Mixes training batches by averaging images.

    Args:
        alpha: λ, the weight of an image in its mixture, is drawn from Beta(alpha, alpha); 1 on CIFAR, 0.2 on ImageNet.
        probability: of mixing a batch.
    """

    def __init__(self, alpha: float = 1.0, probability: float = 1.0) -> None:
        super().__init__()
        require_shares(alpha, probability, "Mixup")
        self.alpha, self.probability = alpha, probability

    def step(self, batch: Batch, inner: Forward) -> Step:
        # without a draw at probability 0, so that training is then exactly training without Mixup
        return inner(self.mix(batch) if self.probability > 0 else batch)

    def mix(self, batch: Batch) -> Batch:
        """The batch with images and targets averaged; the given one stays as it is."""
        target = require_probabilities(batch, "Mixup")
        if torch.rand((), device="cpu") >= self.probability:
            return batch
        kept = draw_kept(self.alpha, 1)
        partners = draw_partners(len(batch.input)).to(batch.input.device)
        mixed = average(batch.input, partners, kept.item())
        return batch._replace(input=mixed, target=mix_targets(target, partners, kept))
