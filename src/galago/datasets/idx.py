"""IDX files: MNIST, Fashion-MNIST, Kuzushiji-MNIST, EMNIST and their kin. Grey images of one size, one label each.

Y. LeCun, C. Cortes, C. Burges, "The MNIST Database of Handwritten Digits", http://yann.lecun.com/exdb/mnist/;
H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", https://arxiv.org/abs/1708.07747. The format: two zero bytes, a type
(8: unsigned bytes), the number of dimensions, each dimension as a big-endian 32-bit number, then the values. Files
may be compressed (`.gz`).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from galago.datasets.download import fetch
from galago.datasets.images import ImageData, Sources
from galago.datasets.source import Pixels
from galago.errors import UserError

_DIGITS = tuple("0123456789")
_CLOTHES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_MNIST = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_FASHION = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


def parse(content: bytes) -> Tensor:
    """The array of unsigned bytes in an IDX file.

    >>> parse(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])).tolist()
    [7, 8, 9]

    Raises:
        ValueError: it is another format, another type of number, or has another length than it says.
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError("not an IDX file")
    if content[2] != 8:
        raise ValueError(f"its numbers are of type {content[2]}, not unsigned bytes (8)")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError("it ends within its header")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"it holds {len(content) - start} bytes but says {'×'.join(map(str, shape))}")
    return (
        torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)
        if content[start:]
        else torch.empty(0)
    )


def read(path: Path) -> Tensor:
    """The array in an IDX file, compressed or not.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        content = path.read_bytes()
        return parse(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read as an IDX file: {error}") from error


def find(folders: Sequence[Path], name: str) -> Path | None:
    """The file of this name, with `.gz` or without, also in the spelling `train-images.idx3-ubyte`."""
    spellings = (name, name.replace("-idx", ".idx"))
    candidates = (folder / f"{s}{end}" for folder in folders for s in spellings for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def read_pair(folders: Sequence[Path], prefix: str) -> Pixels | None:
    """Images and labels; None where there is neither file.

    Raises:
        UserError: one of the two is missing, or they do not belong together.
    """
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    files = [find(folders, name) for name in names]
    if files == [None, None]:
        return None
    if None in files:
        raise UserError(
            f"root: {names[files.index(None)]}[.gz] is missing in {folders[0]}, next to {files[0] or files[1]}"
        )
    images, labels = (read(path) for path in files if path is not None)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UserError(f"{files[0]} of shape {list(images.shape)} and {files[1]} of {list(labels.shape)} do not match")
    return Pixels(images.unsqueeze(1), labels)


class IDX(ImageData):
    """Grey images and labels in IDX files.

    Args:
        root: folder that holds `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]` and the same for `t10k`.
        training_files: what the training files' names begin with (EMNIST: `emnist-letters-train`).
        test_files: what the test files' names begin with; they may be missing where images are held out.
        classes: a name a class; None for the labels themselves.
        batch_size: images a training step sees in each process.
        workers: processes that load images; 0 loads them in the training process itself.
        hold_out: training images set aside for validation: below 1 a share, from 1 on a number; 0 validates on the
            test set.
        split_seed: decides which images are set aside and which are kept by `per_class`.
        per_class: train on at most this many images of each class; None for all.
        augment: transforms of training images, in order; None or [] for none.
        mean: of the grey values, in units of the image scaled to [0, 1].
        std: of the grey values, likewise.
        together: images of one class that each training batch holds together; None for batches of any images.
    """

    def __init__(
        self,
        root: str = "data",
        training_files: str = "train",
        test_files: str = "t10k",
        classes: Sequence[str] | None = None,
        batch_size: int = 128,
        workers: int = 0,
        hold_out: float = 0,
        split_seed: int = 0,
        per_class: int | None = None,
        augment: Sequence[nn.Module] | None = None,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        together: int | None = None,
    ) -> None:
        self.root, self.augment = root, augment
        self.training_files, self.test_files = training_files, test_files
        folders = [Path(root), Path(root) / "raw", Path(root) / type(self).__name__ / "raw"]
        pixels = read_pair(folders, training_files)
        if pixels is None or not len(pixels):
            raise UserError(
                f"root: {root} holds no {training_files}-images-idx3-ubyte and {training_files}-labels-idx1-ubyte"
                " (.gz or not); put the published files there,"
                " or let MNIST or FashionMNIST fetch theirs with download: true"
            )
        super().__init__(
            sources=Sources(pixels, test=read_pair(folders, test_files)),
            classes=tuple(map(str, range(int(pixels.labels.max()) + 1))) if classes is None else classes,
            mean=mean,
            std=std,
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out,
            split_seed=split_seed,
            per_class=per_class,
            augment=augment or (),
            together=together,
        )


class MNIST(IDX):
    """Handwritten digits, 28×28: 60,000 for training and 10,000 for testing.

    Args:
        root: folder that holds `train-images-idx3-ubyte[.gz]` and the other three files.
        batch_size: images a training step sees in each process.
        workers: processes that load images; 0 loads them in the training process itself.
        hold_out: training images set aside for validation: below 1 a share, from 1 on a number; 0 validates on the
            test set.
        split_seed: decides which images are set aside and which are kept by `per_class`.
        per_class: train on at most this many images of each class; None for all.
        augment: transforms of training images, in order; None for shifts by up to two pixels, [] for none.
        mean: of the grey values, in units of the image scaled to [0, 1].
        std: of the grey values, likewise.
        download: fetch the four published files (11 MB) where they are missing.
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
        mean: Sequence[float] = (0.1307,),
        std: Sequence[float] = (0.3081,),
        download: bool = False,
        together: int | None = None,
    ) -> None:
        self.download = download
        if download:
            _complete(Path(root), "https://ossci-datasets.s3.amazonaws.com/mnist/", _MNIST)
        usual: list[nn.Module] = [v2.RandomCrop(28, padding=2)]
        super().__init__(
            root=root,
            classes=_DIGITS,
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out,
            split_seed=split_seed,
            per_class=per_class,
            augment=usual if augment is None else augment,
            mean=mean,
            std=std,
            together=together,
        )


class FashionMNIST(IDX):
    """Zalando's pictures of clothes, 28×28: 60,000 for training and 10,000 for testing.

    Args:
        root: folder that holds `train-images-idx3-ubyte[.gz]` and the other three files.
        batch_size: images a training step sees in each process.
        workers: processes that load images; 0 loads them in the training process itself.
        hold_out: training images set aside for validation: below 1 a share, from 1 on a number; 0 validates on the
            test set.
        split_seed: decides which images are set aside and which are kept by `per_class`.
        per_class: train on at most this many images of each class; None for all.
        augment: transforms of training images, in order; None for shifts by up to two pixels and flips, [] for none.
        mean: of the grey values, in units of the image scaled to [0, 1].
        std: of the grey values, likewise.
        download: fetch the four published files (30 MB) where they are missing.
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
        mean: Sequence[float] = (0.2860,),
        std: Sequence[float] = (0.3530,),
        download: bool = False,
        together: int | None = None,
    ) -> None:
        self.download = download
        if download:
            _complete(Path(root), "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", _FASHION)
        usual: list[nn.Module] = [v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip()]
        super().__init__(
            root=root,
            classes=_CLOTHES,
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out,
            split_seed=split_seed,
            per_class=per_class,
            augment=usual if augment is None else augment,
            mean=mean,
            std=std,
            together=together,
        )


def _complete(root: Path, home: str, files: dict[str, str]) -> None:
    """Fetches what is not there yet, in whatever spelling."""
    for name, md5 in files.items():
        if find([root], name.removesuffix(".gz")) is None:
            fetch(home + name, md5, root)
