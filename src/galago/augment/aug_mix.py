"""AugMix: views of an image that mix chains of simple changes, and a loss that asks for the same answer to all of them.

Dan Hendrycks, Norman Mu, Ekin D. Cubuk, Barret Zoph, Justin Gilmer, Balaji Lakshminarayanan, "AugMix: A Simple Data
Processing Method to Improve Robustness and Uncertainty", ICLR 2020, arXiv:1912.02781 (recalled, not compared with the
paper or its code).

Two views of each image are weighted averages of the image and of several short chains of random changes, so that they
are varied and yet not far from it. Labels are learned from the image itself; the views must agree with it.

    view = m x + (1 - m) Σ_i w_i chain_i(x),    w ~ Dirichlet(1, …, 1),  m ~ Beta(1, 1),  a chain: 1 to 3 operations
    L    = CE(p, q) + λ JS(p, p_1, p_2)
    JS   = ⅓ (KL(p ‖ M) + KL(p_1 ‖ M) + KL(p_2 ‖ M)),   M = (p + p_1 + p_2) / 3

Operations: stretched and equalized histogram, fewer bits, solarizing, turning, shearing and shifting both ways. None is
a corruption of the common benchmarks (no noise, blur, contrast, brightness, color or sharpness), so that
`galago.probes` measures on corruptions that training has not seen.

When: classifiers that meet images of other quality than their training images. It costs the changes (where the network
is; a fifth of a second for 128 images of 32×32 on one processor core) and a forward and backward pass for two more
images each. List it behind methods that change the batch.

Usual setting, the defaults: λ = 12, three chains, severity 3 of 10. Recipe:
recipes/regularize/aug_mix_resnet20_cifar10.yaml.

Chosen here: views are made of the images as methods see them, brought back to 8 bits and normalized again. Each image
has operations, weights and depth of its own; how strong an operation is, is drawn once for each operation, chain and
position in it, so that a whole batch is changed at once. The views go through the network before the image, as one
batch, so that BatchNorm normalizes them by themselves; methods behind this one only see the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Beta, Dirichlet
from torchvision.transforms.v2 import functional

from galago.attacks import pixels
from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.task import scores_of

Change = Callable[[Tensor], Tensor]  # uint8 images N×C×H×W
VIEWS, DEEPEST, SEVEREST = 2, 3, 10


def divergence(scores: Tensor) -> Tensor:
    """`JS`: how far the answers to V views of N images are apart, a scalar; 0 where they are the same, ln V at most.

    Args:
        scores: V×N×K.

    >>> round(divergence(torch.tensor([[[99.0, 0.0]], [[0.0, 99.0]]])).item(), 4)
    0.6931
    """
    log = scores.log_softmax(2)
    mixture = log.logsumexp(0) - math.log(len(scores))
    return (log.exp() * (log - mixture)).sum(2).mean()


def drawn_operations(severity: float, size: tuple[int, int]) -> list[Change]:
    """Every operation, each with a strength drawn anew.

    Args:
        severity: the largest strength, of 10.
        size: H and W of the images.
    """
    level = (0.1 + (severity - 0.1) * torch.rand(7, dtype=torch.float64, device="cpu")) / SEVEREST
    sign = 2.0 * torch.randint(2, (5,), device="cpu") - 1
    turn, shear_x, shear_y, shift_x, shift_y = (level[:5] * sign).tolist()
    height, width = size
    warp = partial(functional.affine, angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0])
    return [
        functional.autocontrast,
        functional.equalize,
        partial(functional.posterize, bits=max(4 - int(4 * level[5].item()), 1)),
        partial(functional.solarize, threshold=256 * (1 - level[6].item())),
        partial(functional.rotate, angle=30 * turn),
        partial(warp, shear=[math.degrees(math.atan(0.3 * shear_x)), 0.0]),
        partial(warp, shear=[0.0, math.degrees(math.atan(0.3 * shear_y))]),
        partial(warp, translate=[round(shift_x * width / 3), 0]),
        partial(warp, translate=[0, round(shift_y * height / 3)]),
    ]


def chain(image: Tensor, severity: float) -> Tensor:
    """Images N×C×H×W, uint8, each after one to three operations of its own."""
    depth, found = torch.randint(1, DEEPEST + 1, (len(image),), device="cpu"), image.clone()
    for position in range(DEEPEST):
        operations = drawn_operations(severity, (image.shape[2], image.shape[3]))
        choice = torch.randint(len(operations), (len(image),), device="cpu")
        for number, operation in enumerate(operations):
            places = ((choice == number) & (position < depth)).nonzero().flatten()
            if len(places):
                places = places.to(image.device)
                found[places] = operation(found[places])
    return found


def mixed_view(image: Tensor, chains: int, severity: float, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """`m x + (1 - m) Σ w_i chain_i(x)`, normalized, N×C×H×W.

    Args:
        image: uint8.
        chains: how many.
        severity: of operations, of 10.
        normalize: from uint8 images to what a network sees.
    """
    weights = Dirichlet(torch.ones(chains, device="cpu")).sample((len(image),)).to(image.device)
    share = Beta(torch.ones(1, device="cpu"), torch.ones(1, device="cpu")).sample((len(image),)).to(image.device)
    clean = normalize(image)
    changed = torch.zeros_like(clean)
    for weight in weights.view(len(image), chains, 1, 1, 1).unbind(1):
        changed += weight * normalize(chain(image, severity))
    return torch.lerp(changed, clean, share.view(-1, 1, 1, 1))


class AugMix(Method):
    """Asks for the same answer to an image and to two views of it.

    Args:
        weight: λ, of the divergence between the three answers.
        chains: of operations that a view mixes.
        severity: how strong operations get, of 10.
    """

    def __init__(self, weight: float = 12.0, chains: int = 3, severity: float = 3.0) -> None:
        super().__init__()
        if weight < 0 or chains < 1:
            raise UserError(f"AugMix: weight {weight:g} and {chains} chains; give 0 or more, and 1 or more")
        if not 0.1 <= severity <= SEVEREST:
            raise UserError(f"AugMix: severity is {severity:g}; give a number from 0.1 to {SEVEREST}, usually 3")
        self.weight, self.chains, self.severity = weight, chains, severity
        self._data: Data | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing.

        Raises:
            UserError: the data are no grey or color images.
        """
        shape = data.example().shape
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise UserError(f"AugMix: images of {'×'.join(map(str, shape[1:]))}; its operations need 1 or 3 channels")
        self._data = data
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        if self.weight == 0:
            return inner(batch)
        said = scores_of(inner.model(self.views(batch.input)))  # first: whoever looks into the network sees the image
        step = inner(batch)
        if len(said) != VIEWS * len(scores_of(step.output)):
            raise UserError("AugMix: a method behind it changes how many images there are; list it in front")
        scores = torch.cat([scores_of(step.output), said]).view(1 + VIEWS, -1, said.shape[1])
        return step.add(aug_mix=self.weight * divergence(scores.float()))

    @torch.no_grad()
    def views(self, image: Tensor) -> Tensor:
        """Two views of each image, normalized, one set behind the other, of images N×C×H×W."""
        assert self._data is not None, "prepare comes first"
        normalize = self._data.normalize
        raw = (pixels(image, normalize) * 255).round().to(torch.uint8)
        views = [mixed_view(raw, self.chains, self.severity, normalize) for _ in range(VIEWS)]
        return torch.cat(views).to(image.dtype)
