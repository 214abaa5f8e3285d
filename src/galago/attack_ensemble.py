"""Stronger attacks, to be used one after another: APGD with two losses, and a search that needs no gradient.

Francesco Croce, Matthias Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020, arXiv:2003.01690 (APGD, DLR). Maksym Andriushchenko, Francesco Croce, Nicolas
Flammarion, Matthias Hein, "Square Attack: a Query-Efficient Black-Box Adversarial Attack via Random Search", ECCV 2020,
arXiv:1912.00049 (recalled).

APGD is projected gradient descent with momentum that halves its step where it makes no headway, so that nothing has to
be tuned. The search repaints random squares and keeps what makes the network less certain.

    APGD    x_k+1 = P(x_k + 0.75 (P(x_k + η u(g(x_k))) - x_k) + 0.25 (x_k - x_k-1)),   η = 2ε; x_1 without momentum
            checkpoint after k = ⌊0.22 n⌋ steps, then after k ← max(k - ⌊0.03 n⌋, ⌊0.06 n⌋) more, each at least 1
            η ← η / 2 and on from the best point, where at most 75 % of the k steps raised the loss, or η was not
            halved last time and the best loss is what it was then
    DLR     -(z_y - max_{k ≠ y} z_k) / (z_(1) - z_(3))                        z sorted from the largest
            -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)                      towards class t; four classes or more
    search  x' = P(x + 2ε u(± in a square of share p of the image, 0 outside)),  kept where z_y - max_{k ≠ y} z_k falls

DLR does not change when scores are multiplied, so that a network cannot hide behind scores that saturate the softmax.
Formulas of u and P, and what a ball is: `galago.attacks`. `galago.probes.adversarial_ensemble` measures by these.

Compared with the official code: both losses, and every step of APGD in the maximum norm. Not compared: the Euclidean
norm and the search, whose p begins at 0.8 and is halved nine times as in the published schedule (recalled); in the
Euclidean norm what the search proposes is a design choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.attacks import Ball, whole_levels

Network = Callable[[Tensor], Tensor]  # images N×C×H×W to scores N×K
ScoreLoss = Callable[[Tensor, Tensor], Tensor]  # scores N×K and N labels to N losses

SMALL = 1e-12  # keeps a ratio of equal scores finite, as in the official code
SHARE = 0.8  # of the image, that the search's first squares cover
HALVED_AT = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # of the search


def cross_entropy(scores: Tensor, label: Tensor) -> Tensor:
    """`-log softmax(z)_y` of each image, N."""
    return nn.functional.cross_entropy(scores, label, reduction="none")


def margin(scores: Tensor, label: Tensor) -> Tensor:
    """`z_y - max_{k ≠ y} z_k`, N: positive where the label's class wins.

    >>> margin(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([0, 2]))
    tensor([ 1., -2.])
    """
    own = scores.gather(1, label[:, None])
    others = scores.scatter(1, label[:, None], -torch.inf)
    return own[:, 0] - others.amax(1)


def dlr(scores: Tensor, label: Tensor) -> Tensor:
    """The difference of logits ratio of each image, N; three classes or more.

    >>> dlr(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 1]))
    tensor([-0.5000,  0.6667])
    """
    ordered = scores.sort(1, descending=True).values
    return -margin(scores, label) / (ordered[:, 0] - ordered[:, 2] + SMALL)


def targeted_dlr(scores: Tensor, label: Tensor, aim: Tensor) -> Tensor:
    """The same towards one other class, N; four classes or more.

    Args:
        scores: z, N×K.
        label: y, N.
        aim: t, N.

    >>> targeted_dlr(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0]), torch.tensor([2]))
    tensor([-0.8000])
    """
    ordered = scores.sort(1, descending=True).values
    own, other = (scores.gather(1, one[:, None])[:, 0] for one in (label, aim))
    return -(own - other) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + SMALL)


def checkpoints(steps: int) -> dict[int, int]:
    """After which of APGD's steps it looks back, and over how many.

    >>> checkpoints(20)
    {4: 4, 7: 3, 9: 2, 10: 1, 11: 1, 12: 1, 13: 1, 14: 1, 15: 1, 16: 1, 17: 1, 18: 1, 19: 1, 20: 1}
    """
    first, fewer, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at, period = {}, first, first
    while at <= steps:
        found[at] = period
        period = max(period - fewer, least)
        at += period
    return found


class Point(NamedTuple):
    """Where APGD stands with each image."""

    image: Tensor  # N×C×H×W
    loss: Tensor  # N
    slope: Tensor  # of the loss, N×C×H×W
    right: Tensor  # N: whether the network's class is the label

    def exchanged(self, other: Point, chosen: Tensor) -> Point:
        """The other point for the chosen images."""
        parts = zip(self, other, strict=True)
        return Point(*(torch.where(chosen.view(-1, *[1] * (own.ndim - 1)), new, own) for own, new in parts))


def look(image: Tensor, label: Tensor, network: Network, loss: ScoreLoss) -> Point:
    """What the network says of images, and how the loss would grow.

    Args:
        image: N×C×H×W, pixels in [0, 1].
        label: N classes.
        network: from such images to scores N×K.
        loss: what is raised.
    """
    seen = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        scores = network(seen)
        losses = loss(scores, label)
        slope = torch.autograd.grad(losses.sum(), seen)[0]
    return Point(image, losses.detach(), slope, scores.argmax(1) == label)


def apgd(
    image: Tensor,
    label: Tensor,
    network: Network,
    loss: ScoreLoss,
    ball: Ball,
    steps: int = 50,
    start: Tensor | None = None,
) -> Point:
    """Where the loss was highest; `right` says of each image whether the network was right about it all the way.

    Args:
        image: N×C×H×W, pixels in [0, 1].
        label: N classes.
        network: from such images to scores N×K.
        loss: what is raised.
        ball: how far the attack may go.
        steps: n.
        start: where to begin, such as `ball.drawn_at_edge(image)`; the image itself by default.
    """
    climb = _Climb(look(image if start is None else start, label, network, loss), ball)
    periods = checkpoints(steps)
    for number in range(1, steps + 1):
        climb.note(look(climb.proposed(image), label, network, loss))
        if number in periods:
            climb.look_back(periods[number])
    return climb.best._replace(right=climb.right)


class _Climb:
    """APGD on its way."""

    def __init__(self, point: Point, ball: Ball) -> None:
        self.ball, self.point, self.best, self.right = ball, point, point, point.right
        self.before: Tensor | None = None
        self.length = torch.full_like(point.loss, 2 * ball.epsilon)
        self.last = torch.zeros_like(point.loss)  # the official code compares the first step's loss with 0
        self.rises = torch.zeros_like(point.loss)
        self.checked, self.halved = point.loss, torch.ones_like(point.right)

    def proposed(self, image: Tensor) -> Tensor:
        """Where the next step leads."""
        here, before = self.point.image, self.before
        uphill = self.length.view(-1, 1, 1, 1) * self.ball.steepest(self.point.slope)
        step = self.ball.project(here + uphill, image)
        self.before = here
        return (
            step if before is None else self.ball.project(here + 0.75 * (step - here) + 0.25 * (here - before), image)
        )

    def note(self, point: Point) -> None:
        """Takes a step, and remembers it if it is the best."""
        self.point, self.right = point, self.right & point.right
        self.rises += point.loss > self.last
        self.last = point.loss
        self.best = self.best.exchanged(point, point.loss > self.best.loss)

    def look_back(self, period: int) -> None:
        """Halves the step and returns to the best point where there was no headway."""
        stuck = (self.rises <= 0.75 * period) | (~self.halved & (self.checked >= self.best.loss))
        self.length = torch.where(stuck, self.length / 2, self.length)
        self.point = self.point.exchanged(self.best, stuck)
        self.checked, self.halved, self.rises = self.best.loss, stuck, torch.zeros_like(self.rises)


def side_of(progress: float, height: int, width: int) -> int:
    """The side of the search's squares when so much of it is over.

    >>> [side_of(progress, 32, 32) for progress in (0.0, 0.001, 0.1, 0.9)]
    [29, 20, 5, 1]
    """
    share = SHARE * 0.5 ** sum(progress >= moment for moment in HALVED_AT)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def signs_in_squares(like: Tensor, side: int) -> Tensor:
    """+1 or -1 a channel in a random square of each image, 0 outside. N×C×H×W.

    Args:
        like: N×C×H×W.
        side: of the squares.
    """
    count, channels, height, width = like.shape
    row, column = (torch.arange(size, device=like.device) for size in (height, width))
    top, left = (torch.randint(size - side + 1, (count, 1), device=like.device) for size in (height, width))
    rows, columns = (row >= top) & (row < top + side), (column >= left) & (column < left + side)
    signs = random_signs((count, channels, 1, 1), like)
    return signs * (rows[:, None, :, None] & columns[:, None, None, :])


def random_signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """+1 or -1."""
    return 2.0 * torch.randint(2, shape, device=like.device).to(like.dtype) - 1


@torch.no_grad()
def square_search(image: Tensor, label: Tensor, network: Network, ball: Ball, queries: int = 500) -> Tensor:
    """Whether a network is right about an image and all that the search shows it in its stead. N.

    Args:
        image: N×C×H×W, raw (uint8).
        label: N classes.
        network: from raw images to scores N×K; a file will do.
        ball: how far the search may go; images are whole levels of 0 to 255, rounded towards the given one.
        queries: how often the network may be asked about an image.
    """
    right = network(image).argmax(1) == label
    center, (height, width) = image / 255, image.shape[-2:]
    stripes = random_signs((len(image), image.shape[1], 1, width), center).expand_as(center)
    held, least = center.clone(), torch.full_like(center[:, 0, 0, 0], torch.inf)
    for number in range(queries - 1):
        (left,) = right.nonzero(as_tuple=True)
        if not len(left):
            break
        signs = signs_in_squares(center[left], side_of(number / queries, height, width)) if number else stripes[left]
        shown = ball.project(held[left] + 2 * ball.epsilon * ball.steepest(signs), center[left])
        scores = network(whole_levels(shown, image[left]))
        found = margin(scores, label[left]).to(least)
        better = found < least[left]
        held[left[better]], least[left[better]] = shown[better], found[better]
        right[left] = scores.argmax(1) == label[left]
    return right
