"""Your own images: a folder for each class, or a table of paths and labels.

Every file is looked at before training begins (`check`), so that a broken one is named at once and not after hours.
One that breaks later is dealt with in the same way: training stops and names it, or leaves it out, which makes its
batch smaller by one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from torchvision.transforms import v2

from galago.datasets.image_files import Files, OnError, inspect_all
from galago.datasets.images import ImageData, Sources
from galago.datasets.listing import Item, Listing, class_names, list_images
from galago.errors import UserError

log = logging.getLogger(__name__)

# Mean and deviation of ImageNet's photographs: what published weights expect. For grey, their averages.
_MEANS = {3: (0.485, 0.456, 0.406), 1: (0.449,)}
_DEVIATIONS = {3: (0.229, 0.224, 0.225), 1: (0.226,)}


class ImageFolder(ImageData):
    """Any class-per-folder tree of images, or a CSV file of paths and labels.

    Args:
        root: folder with a folder for each class; or one with `train`, `val` (`valid`, `validation`) and, if wanted,
            `test`, each with a folder for each class; or a `.csv` file whose first line names the columns `path`
            (relative to the file), `label` and, if wanted, `split`.
        size: height and width the network sees, or one number for both.
        batch_size: images a training step sees in each process.
        workers: processes that load images; 0 loads them in the training process itself.
        channels: 3 for color, 1 for grey.
        convert: whether images with another number of channels are converted or count as unusable.
        crop: share of the shorter side that validation keeps, from the middle.
        hold_out: training images set aside for validation where none are given: below 1 a share, from 1 on a number.
        split_seed: decides which images are set aside and which are kept by `per_class`.
        per_class: train on at most this many images of each class; None for all.
        augment: transforms of training images, in order; None for random crops of 35 to 100 % of the area (design
            choice: ImageNet's 8 % is for a million images) and horizontal flips, [] for none.
        mean: of each channel, in units of the image scaled to [0, 1]; None for ImageNet's.
        std: of each channel, likewise.
        classes: names in the order of the network's outputs; None for all that are found, sorted.
        on_error: stop at images that cannot be used, or skip them.
        check: look at every file before training.
        together: images of one class that each training batch holds together; None for batches of any images.
    """

    def __init__(
        self,
        root: str,
        size: int | Sequence[int] = 224,
        batch_size: int = 64,
        workers: int = 2,
        channels: int = 3,
        convert: bool = True,
        crop: float = 0.875,
        hold_out: float = 0.2,
        split_seed: int = 0,
        per_class: int | None = None,
        augment: Sequence[nn.Module] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        on_error: OnError = OnError.stop,
        check: bool = True,
        together: int | None = None,
    ) -> None:
        if channels not in _MEANS:
            raise UserError(f"channels: {channels} is neither 3 (color) nor 1 (grey)")
        if not 0 < crop <= 1:
            raise UserError(f"crop: {crop:g} is no share of an image; give a number above 0 and up to 1")
        self.root, self.size, self.channels, self.convert, self.crop = root, size, channels, convert, crop
        self.augment, self.on_error, self.check = augment, on_error, check
        height, width = _two(size)
        usual = [v2.RandomResizedCrop((height, width), scale=(0.35, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        listing = list_images(Path(root))
        if check:
            listing = self._usable(listing)
        names = class_names(listing, classes)
        sources = self._sources(listing, names, (channels, height, width))
        super().__init__(
            sources=sources,
            classes=names,
            mean=_MEANS[channels] if mean is None else mean,
            std=_DEVIATIONS[channels] if std is None else std,
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out if sources.validation is None else 0,
            split_seed=split_seed,
            per_class=per_class,
            augment=usual if augment is None else augment,
            together=together,
        )
        self.hold_out = hold_out

    def _usable(self, listing: Listing) -> Listing:
        """The listing without the files that cannot be used.

        Raises:
            UserError: there are such files and they are not to be skipped, or a class has none left.
        """
        items = [*listing.training, *listing.validation, *listing.test]
        reasons = inspect_all([item.path for item in items], self.channels, self.convert)
        if not reasons:
            return listing
        report = _report(items, reasons)
        if self.on_error is OnError.stop:
            raise UserError(f"{report}\nmend or remove them, or leave them out with on_error: skip")
        log.warning("left out: %s", report)
        bad = {items[position] for position in reasons}
        kept = Listing(*([item for item in part if item not in bad] for part in vars(listing).values()))
        for part, before in vars(listing).items():
            if emptied := {i.label for i in before} - {i.label for i in vars(kept)[part]}:
                raise UserError(f"no usable {part} images of class {', '.join(sorted(emptied)[:5])} are left; {report}")
        return kept

    def _sources(self, listing: Listing, names: Sequence[str], shape: tuple[int, int, int]) -> Sources:
        numbers = {name: number for number, name in enumerate(names)}
        training, validation, test = (
            Files(
                [i.path for i in part], [numbers[i.label] for i in part], shape, self.crop, self.convert, self.on_error
            )
            for part in vars(listing).values()
        )
        return Sources(training, validation if len(validation) else None, test if len(test) else None)


def _two(size: int | Sequence[int]) -> tuple[int, int]:
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or min(both) < 1:
        raise UserError(f"size: {size} is neither a positive number nor height and width")
    return both[0], both[1]


def _report(items: Sequence[Item], reasons: dict[int, str]) -> str:
    """How many files cannot be used, and the first ten of them with the reason."""
    lines = [f"  {items[position].path} {reason}" for position, reason in list(reasons.items())[:10]]
    more = [f"  and {len(reasons) - 10} more"] if len(reasons) > 10 else []
    return "\n".join([f"{len(reasons)} of {len(items)} images cannot be used:", *lines, *more])
