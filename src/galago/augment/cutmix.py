"""CutMix: paste a box of one training image into another and mix their labels by area.

Sangdoo Yun, Dongyoon Han, Seong Joon Oh, Sanghyuk Chun, Junsuk Choe, Youngjoon Yoo, "CutMix: Regularization Strategy
to Train Strong Classifiers with Localizable Features", ICCV 2019, arXiv:1905.04899.

Each image receives a rectangle of another image of its batch, and its label becomes the mixture that the pixels are.
The network can no longer lean on one small part of an object, which improves accuracy, localization and the detection
of unknown inputs.

    λ ~ Beta(α, α),  r = sqrt(1 - λ),  box of ⌊H r⌋ × ⌊W r⌋ around a uniform center, clipped to the image
    x ← x[π] inside the box,  x outside
    λ ← 1 - box area / (H W)          (what was clipped away counts as kept)
    q ← λ q + (1 - λ) q[π]

When: training classifiers from scratch, and small students with a teacher (`galago.distill.logits`, which shows the
teacher the mixed image). It costs one copy of the batch. Use clean images to calibrate quantizers after training.

Paper settings: α = 1; probability 0.5 on CIFAR (300 epochs) and 1.0 on ImageNet, throughout the training.

Recipe: recipes/regularize/cutmix_resnet20_cifar10.yaml; with a teacher recipes/demo/student.yaml.

Consequences worth knowing: at α = 1 the adjusted λ is 0.70 on average for 32 pixels (clipping), not 0.5; a side of
⌊c / 2⌋ is laid on both sides of the center, so an odd side loses a pixel and a tiny box may be empty.

Chosen here: the form per image (own λ, box and partner an image; useful in small batches) also decides per image
whether to mix, by the same probability. A `schedule` multiplies the probability over the training, for instance
`galago.schedule.Steps` with milestones [0.9] and factor 0, which ends on unmixed images. Cutting in feature maps
instead of images is not offered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galago.augment.rectangles import around, filled
from galago.batch import Batch, Step
from galago.method import Forward, Method
from galago.mixing import draw_kept, draw_partners, mix_targets, require_shares
from galago.schedule import Constant, Schedule
from galago.task import require_probabilities


def boxes(height: int, width: int, kept: Tensor, center_y: Tensor, center_x: Tensor) -> Tensor:
    """The rectangles to paste, N×4 integers (top, bottom, left, right; bottom and right exclusive), clipped.

    Args:
        height: of the images.
        width: of the images.
        kept: λ, N numbers in [0, 1], float64 so that truncation is exact.
        center_y: N integers from 0 to height - 1.
        center_x: N integers from 0 to width - 1.

    >>> boxes(32, 32, torch.tensor([0.5], dtype=torch.float64), torch.tensor([16]), torch.tensor([0]))
    tensor([[ 5, 27,  0, 11]])
    """
    ratio = (1 - kept).sqrt()
    half_height, half_width = (height * ratio).long() // 2, (width * ratio).long() // 2
    return around(height, width, half_height, half_width, center_y, center_x)


def kept_share(box: Tensor, height: int, width: int) -> Tensor:
    """The adjusted λ: which share of each image lies outside its box. N numbers, float64.

    >>> kept_share(torch.tensor([[0, 11, 0, 11]]), 32, 32)
    tensor([0.8818], dtype=torch.float64)
    """
    top, bottom, left, right = box.unbind(1)
    return 1 - (bottom - top) * (right - left) / torch.tensor(height * width, dtype=torch.float64)


def paste_one(image: Tensor, partners: Tensor, box: Tensor) -> Tensor:
    """The same rectangle of every image replaced by that of its partner. A new tensor.

    Args:
        image: N×…×H×W.
        partners: N indices, on the image's device.
        box: 4 integers on the host.
    """
    top, bottom, left, right = box.tolist()
    mixed = image.clone()
    mixed[..., top:bottom, left:right] = image[..., top:bottom, left:right][partners]
    return mixed


def paste_each(image: Tensor, partners: Tensor, box: Tensor) -> Tensor:
    """Each image's own rectangle replaced by that of its partner. A new tensor.

    Args:
        image: N×…×H×W.
        partners: N indices, on the image's device.
        box: N×4 integers.
    """
    return filled(image, box, image[partners])


class CutMix(Method):
    """Mixes training batches by pasting boxes.

    Args:
        alpha: λ, the share of an image that stays its own, is drawn from Beta(alpha, alpha).
        probability: of mixing a batch (an image, in the form per image); 0.5 on CIFAR, 1.0 on ImageNet.
        per_image: draw λ, box and partner for each image instead of one λ and box a batch.
        schedule: a factor on the probability over the training; the same throughout by default.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        probability: float = 0.5,
        per_image: bool = False,
        schedule: Schedule = Constant(),  # noqa: B008 - has no state
    ) -> None:
        super().__init__()
        require_shares(alpha, probability, "CutMix")
        self.alpha, self.probability, self.per_image, self.schedule = alpha, probability, per_image, schedule

    def step(self, batch: Batch, inner: Forward) -> Step:
        return inner(self.mix(batch, inner.progress))

    def mix(self, batch: Batch, progress: float = 0.0) -> Batch:
        """The batch with boxes pasted and targets mixed, as at this moment; the given one stays as it is."""
        probability = self.probability * self.schedule(progress)
        if probability <= 0:
            return batch  # without a draw, so that training is then exactly training without CutMix
        target, (height, width) = require_probabilities(batch, "CutMix"), batch.input.shape[-2:]
        count = len(batch.input) if self.per_image else 1
        chosen = torch.rand(count, device="cpu") < probability
        if not chosen.any():
            return batch
        kept = draw_kept(self.alpha, count).where(chosen, 1.0)
        center_y, center_x = torch.randint(height, (count,), device="cpu"), torch.randint(width, (count,), device="cpu")
        box = boxes(height, width, kept, center_y, center_x)
        partners = draw_partners(len(batch.input)).to(batch.input.device)
        paste = paste_each(batch.input, partners, box) if self.per_image else paste_one(batch.input, partners, box[0])
        return batch._replace(input=paste, target=mix_targets(target, partners, kept_share(box, height, width)))
