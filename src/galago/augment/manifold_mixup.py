"""Manifold Mixup: weighted averages not only of two images but of what a layer makes of them.

Vikas Verma, Alex Lamb, Christopher Beckham, Amir Najafi, Ioannis Mitliagkas, David Lopez-Paz, Yoshua Bengio, "Manifold
Mixup: Better Representations by Interpolating Hidden States", ICML 2019, arXiv:1806.05236 (recalled; one of the
regularizers compared in arXiv:2003.03879).

For each batch a place in the network is drawn, the input or one of some layers. What is there of each image becomes a
weighted average with another image's, and so does its label, as `galago.augment.mixup` does with images alone.

    layer ~ uniform over the input and the layers named;   λ ~ Beta(α, α)
    h ← λ h + (1 - λ) h[π],   h what the layer gives
    q ← λ q + (1 - λ) q[π]

When: classifiers trained for long, where Mixup helps already. It costs one pass over what the layer gives. Neither with
a teacher, who would see images that are not mixed, nor with quantizers that set their ranges on training batches.

Usual setting: α = 2, the input or the end of one of the first two stages, 1200 epochs on CIFAR. Recipe:
recipes/regularize/manifold_mixup_resnet20_cifar10.yaml.

Chosen here: one λ and one place a batch, partners from the same batch, as in the paper. A network that is not the one
in training but is given its batches (a peer) has its input mixed. Compiled, a network is compiled once for each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.mixing import (
    average,
    draw_kept,
    draw_partners,
    mix_targets,
    require_shares,
)
from galago.stages import shapes_at
from galago.taps import Changes
from galago.task import require_probabilities


class Mixture(NamedTuple):
    """How a batch is mixed."""

    place: int  # among the layers; as many as there are: the input
    partners: Tensor  # π, N indices
    kept: Tensor  # λ, on the batch's device


def mixed(h: Tensor, mixture: Mixture) -> Tensor:
    """`λ h + (1 - λ) h[π]`, of what a layer makes of a batch, or of several batches one behind another.

    >>> mixture = Mixture(0, torch.tensor([1, 0]), torch.tensor(0.75))
    >>> mixed(torch.tensor([[0.0], [8.0], [4.0], [0.0]]), mixture).flatten()
    tensor([2., 6., 3., 1.])
    """
    batches = h.reshape(-1, len(mixture.partners), *h.shape[1:]).transpose(0, 1)
    return average(batches, mixture.partners, mixture.kept.to(h.dtype)).transpose(0, 1).flatten(0, 1)


class ManifoldMixup(Method):
    """Mixes training batches by averaging images, or what a layer makes of them.

    Args:
        layers: where, beside the input, by path or number of stage; the first two stages.
        alpha: λ, the weight of an image in its mixture, is drawn from Beta(alpha, alpha).
        probability: of mixing a batch.
    """

    def __init__(self, layers: Sequence[str | int] = (0, 1), alpha: float = 2.0, probability: float = 1.0) -> None:
        super().__init__()
        require_shares(alpha, probability, "ManifoldMixup")
        if not layers:
            raise UserError("ManifoldMixup: layers is empty; name at least one, or use galago.augment.mixup.Mixup")
        self.layers, self.alpha, self.probability = list(layers), alpha, probability
        self._changes: Changes | None = None
        self._mixture: Mixture | None = None
        self._paths: list[str] = []

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """From now on the layers can mix in training mode.

        Raises:
            UserError: there is no such layer, or it does not give one tensor.
        """
        self._paths = list(shapes_at(model, data, self.layers, "ManifoldMixup"))
        self._changes = Changes(model, self._paths, self._mix)
        return model

    def _mix(self, place: int, h: Tensor) -> Tensor:
        mixture = self._mixture
        return h if mixture is None or mixture.place != place else mixed(h, mixture)

    def step(self, batch: Batch, inner: Forward) -> Step:
        target = require_probabilities(batch, "ManifoldMixup")
        if self.probability == 0 or torch.rand((), device="cpu") >= self.probability:
            return inner(batch)
        kept, mixture = self._drawn(batch, inner.model)
        batch = batch._replace(target=mix_targets(target, mixture.partners, kept))
        if mixture.place == len(self._paths):
            return inner(batch._replace(input=mixed(batch.input, mixture)))
        self._mixture = mixture
        try:
            return inner(batch)
        finally:
            self._mixture = None

    def _drawn(self, batch: Batch, model: nn.Module) -> tuple[Tensor, Mixture]:
        """λ on the host, and the mixture, at the input of a network whose layers cannot mix."""
        place = int(torch.randint(len(self._paths) + 1, (), device="cpu"))
        kept, partners = draw_kept(self.alpha, 1), draw_partners(len(batch.input))
        can = self._changes is not None and self._changes.within(model)
        device = batch.input.device
        share = kept[0].to(device, torch.float32)
        return kept, Mixture(place if can else len(self._paths), partners.to(device), share)

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the hooks out."""
        if self._changes is not None:
            self._changes.remove(model)
        return model

    def summary(self) -> str | None:
        """Where is mixed."""
        return f"ManifoldMixup: mixes the input or what {' or '.join(self._paths)} gives" if self._paths else None
