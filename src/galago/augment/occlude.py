"""Occlusion: a network that is to work on half an image trains and is judged on half images.

Mariana-Iuliana Georgescu, Radu Tudor Ionescu, "Teacher-Student Training and Triplet Loss for Facial Expression
Recognition under Occlusion", ICPR 2020, arXiv:2008.01003.

A part of every image is blackened, as a virtual-reality headset covers a face. The whole image is kept for a teacher
that may see what the model may not (`view: full` in `galago.distill.distill.Distill`).

    x° = M x + (1 - M) black,   black = 0 in pixels, which is -mean / std once images are normalized

`Occluded` is the data set to be judged on: its validation and test images are hidden in part, so that the model, the
exported file and the proof of both answer about what they will meet. `Occlude` does the same to training images, after
every augmentation, so that both views show the same crop and flip.

When: a known part of what a camera sees will be covered. List `Occlude` behind methods that mix images, which would
mix the occluded view alone. It costs nothing.

Usual setting: `LowerHalf`, the half of a face that a headset leaves visible: rows from ⌊H/2⌋ on. `UpperHalf` has the
rows before it, `Part` any rectangle; a class of your own derives from `Visible`.

Recipe: recipes/faces/baseline.yaml.

Chosen here: training images of `Occluded` are whole, for `Occlude` to keep them. Methods that read training images by
themselves (ranges of `post_training`, `ReestimateNorm`) see them so: give them a recipe of their own, which does not
train and says `hide_training: true`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data, Loader, Wrapped
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import device_of

FULL = "full"  # where a batch's `extra` holds the whole images


class Visible(ABC):
    """Which part of an image is not hidden."""

    @abstractmethod
    def __call__(self, height: int, width: int) -> Tensor:
        """True where an image of this size is visible, H×W."""


class Part(Visible):
    """A rectangle, in shares of height and width; a pixel that a border cuts belongs to the part behind the border.

    Args:
        top: where it begins.
        bottom: where it ends.
        left: where it begins.
        right: where it ends.

    >>> Part(top=0.5)(3, 2).int().tolist()
    [[0, 0], [1, 1], [1, 1]]
    """

    def __init__(self, top: float = 0.0, bottom: float = 1.0, left: float = 0.0, right: float = 1.0) -> None:
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            raise UserError(
                f"Part: from {top:g} to {bottom:g} of the height and {left:g} to {right:g} of the width is no part of"
                " an image; give shares from 0 to 1, the first below the second"
            )
        self.top, self.bottom, self.left, self.right = top, bottom, left, right

    def __call__(self, height: int, width: int) -> Tensor:
        seen = torch.zeros(height, width, dtype=torch.bool)
        rows = slice(int(self.top * height), int(self.bottom * height))
        seen[rows, int(self.left * width) : int(self.right * width)] = True
        if not seen.any():
            raise UserError(f"Part: nothing of an image of {height}×{width} would be visible; name a larger part")
        return seen


class LowerHalf(Visible):
    """The rows from ⌊H/2⌋ on."""

    def __call__(self, height: int, width: int) -> Tensor:
        return Part(top=0.5)(height, width)


class UpperHalf(Visible):
    """The rows before ⌊H/2⌋."""

    def __call__(self, height: int, width: int) -> Tensor:
        return Part(bottom=0.5)(height, width)


def occluded(image: Tensor, visible: Visible, black: Tensor) -> Tensor:
    """Images N×…×H×W, black where they are not visible. A new tensor.

    >>> occluded(torch.ones(1, 1, 2, 2), UpperHalf(), torch.tensor(0.0)).tolist()
    [[[[1.0, 1.0], [0.0, 0.0]]]]
    """
    height, width = image.shape[-2:]
    return torch.where(visible(height, width).to(image.device), image, black)


class Occluded(Wrapped):
    """Another data set, with a part of its images hidden wherever a model is judged.

    Args:
        data: the other data set.
        visible: what is not hidden.
        hide_training: hide it in training images too, for recipes that calibrate on them and do not train.
    """

    def __init__(self, data: Data, visible: Visible, hide_training: bool = False) -> None:
        super().__init__(data)
        self.visible, self.hide_training = visible, hide_training

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        """The other's batches: whole, for `Occlude`, unless they are to be hidden too."""
        self.data.seed = self.seed
        batches = self.data.train(epoch, start)
        return Covered(batches, self.visible) if self.hide_training else batches

    def plain(self) -> Loader:
        """The other's unaugmented training images, hidden in part as those that a model is judged on."""
        return Covered(self.data.plain(), self.visible)

    def validation(self) -> Loader:
        """The other's validation images, hidden in part."""
        return Covered(self.data.validation(), self.visible)

    def test(self) -> Loader:
        """The other's test images, hidden in part."""
        return Covered(self.data.test(), self.visible)

    def example(self) -> Tensor:
        """The other's example, hidden in part."""
        return covered(self.data.example(), self.visible)


class Covered:
    """A `Loader`: the batches of another one, their images hidden in part.

    Args:
        batches: of raw images.
        visible: what is not hidden.
    """

    def __init__(self, batches: Loader, visible: Visible) -> None:
        self.batches, self.visible = batches, visible

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch._replace(input=covered(batch.input, self.visible))


def covered(image: Tensor, visible: Visible) -> Tensor:
    """Raw images, 0 where they are not visible."""
    return occluded(image, visible, torch.zeros((), dtype=image.dtype))


class Occlude(Method):
    """Hides a part of every training image and keeps the whole image in the batch's `extra`, as `full`.

    Args:
        visible: what is not hidden; None for what `Occluded` data leave visible.
    """

    black: Tensor

    def __init__(self, visible: Visible | None = None) -> None:
        super().__init__()
        self.visible = visible
        self._seen = visible
        self.register_buffer("black", torch.zeros(()), persistent=False)  # known when the data are

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing in the model.

        Raises:
            UserError: nothing says what is visible, or the data hide it already.
        """
        if isinstance(data, Occluded):
            if data.hide_training:
                raise UserError("Occlude: the data hide a part already and no whole is left; set hide_training: false")
            self._seen = self.visible or data.visible
        if self._seen is None:
            raise UserError(
                "Occlude: visible is null, so the data must be galago.augment.occlude.Occluded; name a part"
            )
        self.black = data.normalize(torch.zeros_like(data.normalize.mean)).to(device_of(model))
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        assert self._seen is not None, "prepare has seen to it"
        hidden = occluded(batch.input, self._seen, self.black)
        return inner(batch._replace(input=hidden, extra={FULL: batch.input} | batch.extra))
