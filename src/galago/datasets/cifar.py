"""CIFAR-10 and CIFAR-100: 32×32 colour photographs, 50,000 for training and 10,000 for testing.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
Read from the published binary files: a record is one label byte (two in CIFAR-100: coarse, fine) and 3,072 bytes, the
red, green and blue planes. Whatever training batches exist are read, in order, so part of the set can be used; an
image's `index` is its position in what was read.

The usual augmentation is that of the ResNet paper: pad by 4, random 32×32 crop, random horizontal flip. Custom is to
choose on the test set; `hold_out: 5000` chooses on training images instead and is the honest way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms import v2

from galago.datasets.download import fetch, unpack
from galago.datasets.images import ImageData, Sources
from galago.datasets.source import Pixels
from galago.errors import UserError

_HOME = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32


def decode(content: bytes, label_bytes: int, label: int) -> Pixels:
    """Records of the binary layout.

    Args:
        content: of one or more files.
        label_bytes: how many begin a record.
        label: which of them counts.
    """
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, label_bytes + _PIXELS)
    return Pixels(records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label])


def read(folder: Path, patterns: Sequence[str], label_bytes: int, label: int) -> Pixels | None:
    """All records of the files with these names, in order of name; None where there is no such file.

    Raises:
        UserError: a file cannot be read or ends within a record.
    """
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    size = label_bytes + _PIXELS
    contents = []
    for path in files:
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        if not contents[-1] or len(contents[-1]) % size:
            raise UserError(f"{path} is damaged: {len(contents[-1])} bytes are not whole records of {size}")
    return decode(b"".join(contents), label_bytes, label) if files else None


def locate(root: Path, name: str, example: str, archive: str, md5: str, download: bool) -> Path:
    """The folder that holds the binary files: `root/name`, or `root` itself.

    Raises:
        UserError: it is not there and was not to be downloaded.
    """
    for folder in (root / name, root):
        if (folder / example).exists():
            return folder
    if not download:
        raise UserError(
            f"root: {root / name} with {example} and the other files of {_HOME}{archive} is not there;"
            " unpack that archive there, or set download: true to have it fetched"
        )
    unpack(fetch(_HOME + archive, md5, root), root)
    return root / name


def names(path: Path, count: int) -> tuple[str, ...]:
    """Class names, a line each; their numbers where there is no such file."""
    try:
        found = tuple(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        found = ()
    return found if len(found) == count else tuple(map(str, range(count)))


def usual_augmentation() -> list[nn.Module]:
    """Pad by 4, crop, flip."""
    return [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]


class CIFAR10(ImageData):
    """Ten classes, 6,000 images each.

    Args:
        root: folder that holds `cifar-10-batches-bin` with `data_batch_1.bin` … and `test_batch.bin`.
        batch_size: images a training step sees in each process.
        workers: processes that load images; 0 loads them in the training process itself.
        hold_out: training images set aside for validation: below 1 a share, from 1 on a number; 0 validates on the
            test set.
        split_seed: decides which images are set aside and which are kept by `per_class`.
        per_class: train on at most this many images of each class; None for all.
        augment: transforms of training images, in order; None for random crops (padding 4) and flips, [] for none.
        mean: of each channel, in units of the image scaled to [0, 1].
        std: of each channel, likewise.
        download: fetch the published archive (170 MB) where the files are missing.
        together: images of one class that each training batch holds together; None for batches of any images.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        workers: int = 0,
        hold_out: float = 0,
        split_seed: int = 0,
        per_class: int | None = None,
        augment: Sequence[nn.Module] | None = None,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        download: bool = False,
        together: int | None = None,
    ) -> None:
        self.root, self.augment, self.download = root, augment, download
        archive, md5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
        folder = locate(Path(root), "cifar-10-batches-bin", "data_batch_1.bin", archive, md5, download)
        training = read(folder, ["data_batch_[0-9]*.bin"], 1, 0)
        assert training is not None, "locate saw data_batch_1.bin"
        super().__init__(
            sources=Sources(training, test=read(folder, ["test_batch.bin"], 1, 0)),
            classes=names(folder / "batches.meta.txt", 10),
            mean=mean,
            std=std,
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out,
            split_seed=split_seed,
            per_class=per_class,
            augment=usual_augmentation() if augment is None else augment,
            together=together,
        )


class CIFAR100(ImageData):
    """A hundred classes, 600 images each; or their twenty superclasses.

    Args:
        root: folder that holds `cifar-100-binary` with `train.bin` and `test.bin`.
        batch_size: images a training step sees in each process.
        workers: processes that load images; 0 loads them in the training process itself.
        hold_out: training images set aside for validation: below 1 a share, from 1 on a number; 0 validates on the
            test set.
        split_seed: decides which images are set aside and which are kept by `per_class`.
        per_class: train on at most this many images of each class; None for all.
        augment: transforms of training images, in order; None for random crops (padding 4) and flips, [] for none.
        mean: of each channel, in units of the image scaled to [0, 1].
        std: of each channel, likewise.
        coarse: tell the twenty superclasses apart instead of the hundred classes.
        download: fetch the published archive (169 MB) where the files are missing.
        together: images of one class that each training batch holds together; None for batches of any images.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        workers: int = 0,
        hold_out: float = 0,
        split_seed: int = 0,
        per_class: int | None = None,
        augment: Sequence[nn.Module] | None = None,
        mean: Sequence[float] = (0.5071, 0.4865, 0.4409),
        std: Sequence[float] = (0.2673, 0.2564, 0.2762),
        coarse: bool = False,
        download: bool = False,
        together: int | None = None,
    ) -> None:
        self.root, self.augment, self.coarse, self.download = root, augment, coarse, download
        archive, md5 = "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"
        folder = locate(Path(root), "cifar-100-binary", "train.bin", archive, md5, download)
        label = 0 if coarse else 1
        training = read(folder, ["train.bin"], 2, label)
        assert training is not None, "locate saw train.bin"
        super().__init__(
            sources=Sources(training, test=read(folder, ["test.bin"], 2, label)),
            classes=names(folder / f"{'coarse' if coarse else 'fine'}_label_names.txt", 20 if coarse else 100),
            mean=mean,
            std=std,
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out,
            split_seed=split_seed,
            per_class=per_class,
            augment=usual_augmentation() if augment is None else augment,
            together=together,
        )
