"""How many images a second are loaded: Galago's data sets beside plain torchvision, in one run on one machine.

    python benchmarks/loading.py [--cifar FOLDER] [--images FOLDER] [--workers 0 1 2] [--seconds 3]

Each row loads the same files with the same augmentation and batch size; the peer is a torchvision data set with
`torchvision.transforms.v2` in a shuffling `DataLoader`, as its tutorials write it. Rounds of both alternate and the
median counts. The digits need no files; for CIFAR-10 and an image folder say where they are. The two do not promise the
same: an epoch of Galago is reproducible whatever the number of workers, the peer's is not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder as PeerFolder
from torchvision.transforms import v2

from galago.data import Data
from galago.datasets.cifar import CIFAR10
from galago.datasets.digits import Digits
from galago.datasets.image_folder import ImageFolder
from galago.datasets.images import ImageData


class Case(NamedTuple):
    """A data set, the same as the peer would load it, and how."""

    name: str
    data: ImageData
    peer: Dataset[Any]


class PeerPixels(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory as torchvision's CIFAR10 serves them: a PIL image, transformed one by one."""

    def __init__(self, data: ImageData, transform: v2.Transform) -> None:
        taken = data.training.source.take(data.training.positions).images
        self.images = [v2.functional.to_pil_image(image) for image in taken]
        self.labels = data.training.source.labels[data.training.positions].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[position]), self.labels[position]


def cases(cifar: str | None, images: str | None) -> Iterable[Case]:
    """Whatever can be measured with the folders that are there."""
    digits = Digits()
    yield Case("digits", digits, PeerPixels(digits, v2.Compose([v2.RandomCrop(8, padding=1), v2.PILToTensor()])))
    if cifar:
        data, crop = CIFAR10(cifar), [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        yield Case("CIFAR-10, crop and flip", data, PeerPixels(data, v2.Compose([*crop, v2.PILToTensor()])))
        colors = [*crop, v2.ColorJitter(0.2, 0.2)]
        data = CIFAR10(cifar, augment=colors)
        yield Case("CIFAR-10, and color jitter", data, PeerPixels(data, v2.Compose([*colors, v2.PILToTensor()])))
    if images:
        steps = [v2.RandomResizedCrop(224, scale=(0.35, 1)), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        peer = PeerFolder(images, transform=v2.Compose(steps))
        yield Case("image folder at 224", ImageFolder(images, hold_out=0.01), peer)


def rate(loader: Iterable[Any], batch_size: int, seconds: float) -> float:
    """Images a second, from the first request on, in about so many seconds."""
    start, count = time.perf_counter(), 0
    for _ in loader:
        count += batch_size
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def compare(case: Case, workers: int, seconds: float, rounds: int) -> tuple[float, float]:
    """The median rates of Galago and the peer."""
    case.data.workers = workers
    size = case.data.batch_size
    mine, theirs = [], []
    for epoch in range(rounds):
        mine.append(rate(epochs(case.data, epoch), size, seconds))
        peer = DataLoader(case.peer, size, shuffle=True, num_workers=workers, drop_last=True)
        theirs.append(rate(repeated(peer), size, seconds))
    return statistics.median(mine), statistics.median(theirs)


def epochs(data: Data, first: int) -> Iterable[Any]:
    """Epoch after epoch."""
    while True:
        yield from data.train(first)
        first += 1


def repeated(loader: DataLoader[Any]) -> Iterable[Any]:
    """The same loader again and again."""
    while True:
        yield from loader


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", help="folder that holds cifar-10-batches-bin")
    parser.add_argument("--images", help="folder with a folder of images for each class")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| data set | workers | Galago, images/s | torchvision, images/s | ratio |\n|---|--:|--:|--:|--:|")
    for case in cases(arguments.cifar, arguments.images):
        for workers in arguments.workers:
            mine, theirs = compare(case, workers, arguments.seconds, arguments.rounds)
            print(f"| {case.name} | {workers} | {mine:,.0f} | {theirs:,.0f} | {mine / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
