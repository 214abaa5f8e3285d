"""Adversarial training: learn from images that were changed to fool the network as it is now.

Aleksander Madry, Aleksandar Makelov, Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu, "Towards Deep Learning Models
Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083 (recalled; the settings of parametric noise injection
are those of its official code).

Before each training step the images are attacked by projected gradient descent (`galago.attacks.pgd`), and the network
learns from what comes out, or from both.

    x̃ = PGD(x, L(·, q)),   x_0 random in the ball,   network in evaluation mode
    L = m L(x, q) + (1 - m) L(x̃, q)

When: the defense that has stood up best to stronger attacks. It costs a forward and a backward pass for each
of its steps, so that training takes eight times as long, and several points of accuracy on clean images. List it behind
methods that change the batch, or they change the attacked images once more. Behind `galago.distill.distill.Distill` the
teacher sees the clean images, as it is meant with `galago.distill.noise_injection`; in front of it the attacked ones.

Usual setting, the defaults: 7 steps of 2/255 within 8/255 of each pixel value, and nothing else (m = 0). Parametric
noise injection: 7 steps of 0.01 within 0.031, m = 0.5, the network's own answers instead of labels, from epoch 5 of 160
on. Recipe: recipes/distill/parametric_noise_resnet20_cifar10.yaml.

Chosen here: pixels are attacked in [0, 1], before normalization. A network with noise inside is attacked with its noise
on, each gradient from one draw. The attack raises the cross-entropy, whatever the task's losses are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.attacks import Ball, Linf, attacked
from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import evaluating
from galago.task import require_probabilities, scores_of


class AdversarialView(Method):
    """Trains on attacked images.

    Args:
        ball: how far the attack may go; 8/255 in every pixel value by default.
        step_size: length of one of its steps; a quarter of the ball's radius by default.
        steps: how many.
        clean_weight: the share of the loss that clean images keep, m.
        own_labels: attack what the network says of the clean image, so that the attack tells it nothing of the label.
        start: the share of the training that goes by before the first attack.
    """

    def __init__(
        self,
        ball: Ball | None = None,
        step_size: float | None = None,
        steps: int = 7,
        clean_weight: float = 0.0,
        own_labels: bool = False,
        start: float = 0.0,
    ) -> None:
        super().__init__()
        if steps < 1 or (step_size is not None and step_size <= 0):
            raise UserError(f"AdversarialView: {steps} steps of {step_size} attack nothing; give more than 0 of both")
        for name, share in (("clean_weight", clean_weight), ("start", start)):
            if not 0 <= share < 1:
                raise UserError(f"AdversarialView: {name} is {share:g}; give a share from 0 to less than 1")
        self.ball = Linf(8 / 255) if ball is None else ball
        self.step_size, self.steps = step_size, steps
        self.clean_weight, self.own_labels, self.start = clean_weight, own_labels, start
        self._data: Data | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        self._data = data  # knows how images were normalized
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        if inner.progress < self.start:
            return inner(batch)
        view = batch._replace(input=self.attacked(inner.model, batch))
        clean = inner(batch).losses if self.clean_weight else None
        step = inner(view)._replace(batch=batch)
        if clean is None:
            return step
        mixed = {name: torch.lerp(loss, clean[name], self.clean_weight) for name, loss in step.losses.items()}
        return step._replace(losses=mixed)

    def attacked(self, model: nn.Module, batch: Batch) -> Tensor:
        """The attacked images, normalized."""
        assert self._data is not None, "prepare comes first"
        step = self.ball.epsilon / 4 if self.step_size is None else self.step_size
        with evaluating(model):
            target = self.aim(model, batch)
        return attacked(model, batch.input, target, self._data.normalize, self.ball, step, self.steps)

    def aim(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the attack leads away from: the targets, or the network's own answers. Class probabilities N×K."""
        target = require_probabilities(batch, "AdversarialView")
        if not self.own_labels:
            return target
        with torch.no_grad():
            said = scores_of(model(batch.input)).argmax(1)
        return nn.functional.one_hot(said, target.shape[1]).to(target.dtype)
