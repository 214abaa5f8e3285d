"""Energy margins: scores are taught to be large together on images of the classes, and small on all others.

Weitang Liu, Xiaoyun Wang, John Owens, Yixuan Li, "Energy-based Out-of-distribution Detection", NeurIPS 2020,
arXiv:2010.03759.

The energy of an image is low where the network gives some class a high score. Images of the classes are pushed below
one margin, images from outside (`galago.outside`) above another; between the two nothing is asked.

    E(x) = -log Σ_k exp(z_k(x))
    L += w [ mean relu(E(x_in) - m_in)² + mean relu(m_out - E(x_out))² ]

When: a trained network is to tell what it was not trained on, and there are images that stand for what that may be.
It is fine-tuning: a few epochs from finished weights. Each step costs a pass over as many images from outside as a
batch holds. A network learns what it is shown: one that was taught noise may know noise alone, so measure on sets that
it was not taught (`galago.probes.out_of_distribution`, by the score `Energy`).

Usual setting (official run script, and the defaults): w = 0.1, m_in = -23 for CIFAR-10 (-27 for CIFAR-100), m_out = -5;
10 epochs from trained weights, SGD at 0.001 with a cosine, weight decay 5e-4. The margins belong to the scores of the
network that one begins with: look at its energies first.

Recipe: recipes/regularize/energy_margin_resnet20_cifar10.yaml.

Chosen here: where no sets are named, images are made up. Some training images of each set are kept in memory, raw; each
step draws its own with replacement, of all sets as many on average. They pass in evaluation mode, so that BatchNorm's
statistics stay those of the classes' images, as in deployment; the official code passes both together. Where a task may
abstain, z are the scores of the classes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data, Loader
from galago.errors import UserError
from galago.method import Forward, Method
from galago.outside import Outside
from galago.outside_made_up import chosen
from galago.probe import evaluating, normalized
from galago.taps import unnoticed
from galago.task import class_scores


def energies(z: Tensor) -> Tensor:
    """`E = -log Σ_k exp(z_k)`: N numbers of class scores N×K.

    >>> energies(torch.zeros(1, 1))
    tensor([-0.])
    """
    return -z.logsumexp(1)


def margin_loss(inside: Tensor, outside: Tensor, inside_margin: float, outside_margin: float) -> Tensor:
    """`mean relu(E_in - m_in)² + mean relu(m_out - E_out)²`, a scalar.

    Args:
        inside: E_in, N energies of images of the classes.
        outside: E_out, M energies of others.
        inside_margin: m_in.
        outside_margin: m_out.

    >>> margin_loss(torch.tensor([-24.0, -20.0]), torch.tensor([-7.0, 0.0]), -23.0, -5.0)
    tensor(6.5000)
    """
    too_high, too_low = (inside - inside_margin).relu(), (outside_margin - outside).relu()
    return too_high.square().mean() + too_low.square().mean()


def first(loader: Loader, images: int) -> Tensor:
    """So many images from the beginning, or all, N×C×H×W; raw."""
    found: list[Tensor] = [torch.empty(0, dtype=torch.uint8)]
    for batch in loader:
        found.append(batch.input)
        if sum(map(len, found)) >= images:
            break
    return torch.cat(found)[:images]


class EnergyMargin(Method):
    """Pushes energies of the classes' images below a margin and those of others above one.

    Args:
        weight: w, of this loss.
        inside_margin: m_in, below which energies of the classes' images are to be.
        outside_margin: m_out, above which those of others are to be.
        outside: sets of other images; None for five made-up ones.
        images: how many training images of each set are used, at most.
    """

    def __init__(
        self,
        weight: float = 0.1,
        inside_margin: float = -23.0,
        outside_margin: float = -5.0,
        outside: Sequence[Outside] | None = None,
        images: int = 10_000,
    ) -> None:
        super().__init__()
        if weight < 0:
            raise UserError(f"EnergyMargin: weight is {weight:g}; give 0 or more, 0.1 is usual")
        if inside_margin >= outside_margin:
            raise UserError(
                f"EnergyMargin: inside_margin {inside_margin:g} must lie below outside_margin {outside_margin:g};"
                " energies are negative where scores are high, -23 and -5 are usual"
            )
        self.weight, self.inside_margin, self.outside_margin = weight, inside_margin, outside_margin
        if images < 1:
            raise UserError(f"EnergyMargin: images is {images}; give 1 or more, 10000 is usual")
        self.outside, self.images = chosen(outside, "EnergyMargin"), images
        self._data: Data | None = None
        self._sets: list[Tensor] = []

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing; makes or loads the images from outside."""
        self._data = data  # knows how images are normalized
        self._sets = [first(one.training(data), self.images) for one in self.outside]
        for one, images in zip(self.outside, self._sets, strict=True):
            if not len(images):
                raise UserError(f"EnergyMargin: {one.name} holds no training images; leave it out of `outside`")
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        inside = energies(class_scores(step.output, inner.task).float())
        outside = energies(self.others(batch, inner).float())
        loss = margin_loss(inside, outside, self.inside_margin, self.outside_margin)
        return step.add(energy_margin=self.weight * loss)

    def others(self, batch: Batch, inner: Forward) -> Tensor:
        """Class scores N×K of as many images from outside as the batch holds."""
        assert self._data is not None, "prepare comes first"
        drawn = torch.stack([self.draw() for _ in batch.input])
        image = normalized(self._data, drawn, batch.input.device).to(batch.input.dtype)
        with evaluating(inner.model), unnoticed():
            return class_scores(inner.model(image), inner.task)

    def draw(self) -> Tensor:
        """One raw image of any set, C×H×W, by torch's generator."""
        chosen_set = self._sets[int(torch.randint(len(self._sets), ()))]
        return chosen_set[int(torch.randint(len(chosen_set), ()))]
