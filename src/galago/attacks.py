"""Attacks: the small change of an image that raises a loss most, as functions of any network.

FGSM: Ian Goodfellow, Jonathon Shlens, Christian Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015,
arXiv:1412.6572. PGD: Aleksander Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
2018, arXiv:1706.06083. EOT: Anish Athalye et al., "Synthesizing Robust Adversarial Examples", ICML 2018,
arXiv:1707.07397. All three are recalled; FGSM and PGD are compared with a published code's numbers.

    g(x) = mean over n draws of ∇_x loss(x)                        a network that draws noise is averaged over (EOT)
    FGSM   x' = P(x + ε u(g(x)))                                   u: the unit step that raises the loss most
    PGD    x_0 = x, or a random point;  x_k+1 = P(x_k + s u(g(x_k)))
    L∞     u(g) = sign(g)      P: to within ε of x in every pixel value, then to [0, 1]
    L2     u(g) = g / ‖g‖₂     P: to within ε of x as a whole, then to [0, 1]

Images are N×C×H×W with pixels in [0, 1], before normalization: on normalized ones ε would be four to five times as
large as meant. A loss gives one number an image, and each image is attacked on its own, so that the network has to be
in evaluation mode. `galago.probes.adversarial` measures by these, `galago.augment.adversarial_view` and
`galago.regularize.logit_pairing` train on them (`attacked`). Stronger attacks are in `galago.attack_ensemble`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from galago.data import Normalize
from galago.errors import UserError
from galago.probe import evaluating
from galago.task import scores_of

Loss = Callable[[Tensor], Tensor]  # images N×C×H×W in [0, 1] to N losses


class Ball(ABC):
    """All images no further than `epsilon` from a given one.

    Args:
        epsilon: the radius, where the largest pixel is 1.
    """

    norm: ClassVar[str]

    def __init__(self, epsilon: float) -> None:
        if epsilon <= 0:
            raise UserError(f"{type(self).__name__}: epsilon is {epsilon:g}; give a positive radius, pixels go to 1")
        self.epsilon = epsilon

    @property
    def name(self) -> str:
        """The norm and the radius, as a part of a number's name: `linf_0.0314`."""
        return f"{self.norm}_{self.epsilon:.3g}"

    def project(self, image: Tensor, center: Tensor) -> Tensor:
        """The nearest image in the ball around `center` and with pixels in [0, 1]. Both N×C×H×W."""
        return (center + self.shortened(image - center)).clamp(0, 1)

    @abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """The step of length 1, of each image, along which a loss with this gradient grows most. N×C×H×W."""

    @abstractmethod
    def shortened(self, change: Tensor) -> Tensor:
        """The nearest changes that are no longer than epsilon. N×C×H×W."""

    @abstractmethod
    def drawn(self, center: Tensor) -> Tensor:
        """A random image of the ball around each, uniform before pixels are cut to [0, 1]. N×C×H×W."""

    @abstractmethod
    def drawn_at_edge(self, center: Tensor) -> Tensor:
        """A random image at the ball's edge, before pixels are cut to [0, 1]. N×C×H×W."""


class Linf(Ball):
    """Every pixel value may change by `epsilon`.

    >>> Linf(0.25).project(torch.tensor([0.0, 0.5, 0.9]), torch.tensor([0.5, 0.5, 1.0]))
    tensor([0.2500, 0.5000, 0.9000])

    Args:
        epsilon: the largest change of a pixel value; 8/255 is usual.
    """

    norm: ClassVar[str] = "linf"

    def __init__(self, epsilon: float = 8 / 255) -> None:
        super().__init__(epsilon)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def shortened(self, change: Tensor) -> Tensor:
        return change.clamp(-self.epsilon, self.epsilon)

    def drawn(self, center: Tensor) -> Tensor:
        return (center + self.epsilon * (2 * torch.rand_like(center) - 1)).clamp(0, 1)

    def drawn_at_edge(self, center: Tensor) -> Tensor:
        change = 2 * torch.rand_like(center) - 1
        return (center + self.epsilon * change / change.abs().amax((1, 2, 3), keepdim=True)).clamp(0, 1)


class L2(Ball):
    """All changes of an image, squared, may sum to `epsilon` squared.

    >>> L2(1.0).shortened(torch.tensor([[[[3.0, 4.0]]], [[[0.3, 0.4]]]])).flatten(1)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])

    Args:
        epsilon: the length of the largest change of an image; 0.5 is usual for 32×32 pixels.
    """

    norm: ClassVar[str] = "l2"

    def __init__(self, epsilon: float = 0.5) -> None:
        super().__init__(epsilon)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient / length(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)

    def shortened(self, change: Tensor) -> Tensor:
        return change * (self.epsilon / length(change).clamp_min(self.epsilon))

    def drawn(self, center: Tensor) -> Tensor:
        dimensions = center[0].numel()
        radius = torch.rand_like(center[:, :1, :1, :1]) ** (1 / dimensions)  # as much of the volume lies within it
        return (center + self.epsilon * radius * self.steepest(torch.randn_like(center))).clamp(0, 1)

    def drawn_at_edge(self, center: Tensor) -> Tensor:
        return (center + self.epsilon * self.steepest(torch.randn_like(center))).clamp(0, 1)


def length(change: Tensor) -> Tensor:
    """The Euclidean length of each image, N×1×1×1."""
    return change.square().sum((1, 2, 3), keepdim=True).sqrt()


def against(network: Callable[[Tensor], Any], target: Tensor) -> Loss:
    """The loss that an attack raises: the cross-entropy of what a network says of each image.

    Args:
        network: from images in [0, 1] to class scores N×K, or a dict whose entry `main` counts.
        target: class probabilities N×K.
    """
    return lambda image: nn.functional.cross_entropy(scores_of(network(image)), target, reduction="none")


def pixels(image: Tensor, normalize: Normalize) -> Tensor:
    """Normalized images as they were in [0, 1]. N×C×H×W.

    >>> pixels(torch.tensor([[[[2.0]]]]), Normalize([0.5], [0.25])).item()
    1.0
    """
    return (image * normalize.std + normalize.mean).clamp(0, 1)


def attacked(
    model: nn.Module, image: Tensor, target: Tensor, normalize: Normalize, ball: Ball, step: float, steps: int
) -> Tensor:
    """What methods train on: normalized images after an attack on a network as it is, in evaluation mode.

    Args:
        model: from normalized images to raw output.
        image: normalized, N×C×H×W.
        target: class probabilities N×K that the attack leads away from.
        normalize: what the images have gone through.
        ball: how far the attack may go; it begins at random in it.
        step: length of a step.
        steps: how many.
    """
    clean = pixels(image, normalize)
    with evaluating(model):
        loss = against(lambda seen: model(normalize(seen)), target)
        seen: Tensor = normalize(pgd(clean, loss, ball, step, steps, start=ball.drawn(clean)))
    return seen


def gradient(loss: Loss, image: Tensor, draws: int = 1) -> Tensor:
    """`g`: the loss's gradient at each image, averaged over so many draws of the network's noise. N×C×H×W.

    >>> gradient(lambda x: x.square().flatten(1).sum(1), torch.full((1, 1, 1, 2), 3.0)).flatten()
    tensor([6., 6.])
    """
    total = torch.zeros_like(image)
    for _ in range(draws):
        seen = image.detach().clone().requires_grad_()
        with torch.enable_grad():
            total += torch.autograd.grad(loss(seen).sum(), seen)[0]
    return total / draws


def fgsm(image: Tensor, loss: Loss, ball: Ball, draws: int = 1) -> Tensor:
    """One step to the edge of the ball. Arguments as those of `pgd`."""
    return pgd(image, loss, ball, step=ball.epsilon, steps=1, draws=draws)


def pgd(
    image: Tensor, loss: Loss, ball: Ball, step: float, steps: int, draws: int = 1, start: Tensor | None = None
) -> Tensor:
    """Many steps within the ball; the last image. N×C×H×W.

    Args:
        image: N×C×H×W, pixels in [0, 1].
        loss: what is raised.
        ball: how far the attack may go.
        step: length of a step, s.
        steps: how many.
        draws: of the network's noise that each gradient is averaged over, n.
        start: where to begin, such as `ball.drawn(image)`; the image itself by default.

    >>> attacked = pgd(torch.full((1, 1, 1, 1), 0.5), lambda x: x.flatten(), Linf(0.3), step=0.1, steps=2)
    >>> round(attacked.item(), 4)
    0.7
    """
    attacked = image if start is None else start
    for _ in range(steps):
        attacked = ball.project(attacked + step * ball.steepest(gradient(loss, attacked, draws)), image)
    return attacked


@torch.no_grad()
def worst(candidates: Sequence[Tensor], loss: Loss, draws: int = 1) -> Tensor:
    """Of several attacks on the same images, each image's with the highest mean loss. N×C×H×W.

    Args:
        candidates: each N×C×H×W.
        loss: what tells them apart.
        draws: of the network's noise that it is averaged over, so that no candidate wins by a lucky draw.
    """
    losses = torch.stack([sum((loss(one) for _ in range(draws)), torch.zeros(())) for one in candidates])
    images = torch.stack(list(candidates))
    return images[losses.argmax(0), torch.arange(images.shape[1], device=images.device)]


def whole_levels(attacked: Tensor, image: Tensor) -> Tensor:
    """Attacked images as bytes, each value rounded towards the raw image, so that no change becomes larger.

    >>> whole_levels(torch.tensor([[[[0.5]]]]), torch.tensor([[[[120]]]], dtype=torch.uint8)).item()
    127
    """
    change = 255 * attacked - image
    return (image + change.sign() * (change.abs() + 1e-3).floor()).clamp(0, 255).to(torch.uint8)
