"""ALP, adversarial logit pairing: an image and an attack on it are to get the same scores.

Harini Kannan, Alexey Kurakin, Ian Goodfellow, "Adversarial Logit Pairing", 2018, arXiv:1803.06373 (recalled; one of the
regularizers compared in arXiv:2003.03879, weighted as in a public robustness code base).

The network learns from each image and from an attack on it as the network is now, and is told besides that both should
make it say the same, class by class.

    x̃ = PGD(x, L(·, q)),   x_0 random in the ball,   network in evaluation mode
    L = ½ CE(z, q) + ½ CE(z̃, q) + η (1 / N K) Σ_b,k (z_bk - z̃_bk)²,   z = f(x),  z̃ = f(x̃)

The gradient goes through both.

When: as `galago.augment.adversarial_view`, which is the plain defense, with `galago.probes.adversarial` to measure
it by many steps: pairing also makes gradients small, which flatters it against weak attacks (Engstrom et al. 2018,
arXiv:1807.10272, broke the paper's own ImageNet network). Costs a forward and a backward pass for each step of the
attack and two for learning. List it behind methods that change the batch.

Usual setting: η = 0.5; attacks of CIFAR, 7 steps of 2/255 within 8/255. Recipe:
recipes/regularize/logit_pairing_resnet20_cifar10.yaml.

Chosen here: clean and attacked images are two passes, so that BatchNorm normalizes each by itself; the attacked one
comes first, and whoever looks into the network afterwards sees the clean one. Other losses of methods behind this one
are halved and added up likewise. Targets may be mixed or smoothed.
"""

from __future__ import annotations

from torch import Tensor, nn

from galago.attacks import Ball, Linf, attacked
from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.task import require_probabilities, scores_of


def distance(clean: Tensor, adversarial: Tensor) -> Tensor:
    """The mean over images and classes of the squared difference of scores N×K, a scalar.

    >>> import torch
    >>> distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])).item()
    2.0
    """
    return (clean - adversarial).square().mean()


class LogitPairing(Method):
    """Trains on clean and attacked images and on how far their scores are apart.

    Args:
        pairing: η, the weight of the squared difference of scores.
        ball: how far the attack may go; 8/255 in every pixel value by default.
        step_size: length of one of its steps; a quarter of the ball's radius by default.
        steps: how many.
    """

    def __init__(
        self,
        pairing: float = 0.5,
        ball: Ball | None = None,
        step_size: float | None = None,
        steps: int = 7,
    ) -> None:
        super().__init__()
        if pairing < 0:
            raise UserError(f"LogitPairing: pairing is {pairing:g}; give 0 or more, usually 0.5")
        if steps < 1 or (step_size is not None and step_size <= 0):
            raise UserError(f"LogitPairing: {steps} steps of {step_size} attack nothing; give more than 0 of both")
        self.ball = Linf(8 / 255) if ball is None else ball
        self.pairing, self.step_size, self.steps = pairing, step_size, steps
        self._data: Data | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        self._data = data  # knows how images were normalized
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        adversarial = inner(batch._replace(input=self.attacked(inner.model, batch)))
        clean = inner(batch)
        halves = {name: (loss + adversarial.losses[name]) / 2 for name, loss in clean.losses.items()}
        apart = distance(scores_of(clean.output), scores_of(adversarial.output))
        return clean._replace(losses=halves).add(logit_pairing=self.pairing * apart)

    def attacked(self, model: nn.Module, batch: Batch) -> Tensor:
        """The attacked images, normalized."""
        assert self._data is not None, "prepare comes first"
        target = require_probabilities(batch, "LogitPairing")
        step = self.ball.epsilon / 4 if self.step_size is None else self.step_size
        return attacked(model, batch.input, target, self._data.normalize, self.ball, step, self.steps)
