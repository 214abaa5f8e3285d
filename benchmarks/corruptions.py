"""How many images a second are corrupted, by type and size: Galago in batches beside one image after another.

    python benchmarks/corruptions.py [--sizes 32 64 224] [--only fog snow] [--severities 1 3 5] [--threads 1]

The peer is `imagecorruptions` (pip install imagecorruptions), the usual Python implementation, where it is installed.
It has the parameters of ImageNet only, whatever the size, so Galago is then given the same. Where it is not installed,
the peer is Galago's own code, called for one image at a time, with the parameters for the size: what batches bring, and
no statement about anybody else. Both run in this process; images are random bytes; the median of several rounds counts.
Loading images is not measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galago.corrupt.corruption import Corruption
from galago.corrupt.draws import Draws
from galago.corrupt.published import benchmark, extra

PEER = importlib.util.find_spec("imagecorruptions") is not None


def mend_peer() -> None:
    """Gives imagecorruptions 1.1.2 what newer versions of NumPy and scikit-image have renamed."""
    import numpy as np
    from imagecorruptions import corruptions as peer

    vars(np).setdefault("float_", np.float64)
    gaussian = peer.gaussian

    def renamed(image: Any, *given: Any, multichannel: bool = False, **others: Any) -> Any:
        return gaussian(image, *given, channel_axis=-1 if multichannel else None, **others)

    if "multichannel" not in inspect.signature(gaussian).parameters:
        peer.gaussian = renamed


class Rates(NamedTuple):
    """Seconds an image, of Galago and of the peer."""

    own: float
    peer: float


def own(corruption: Corruption, images: Tensor, severity: int) -> None:
    """A batch, with ImageNet's parameters where the peer has no others."""
    if PEER:
        parts = torch.split(images, max(1, corruption.values_at_once // images[0].numel()))
        for part in parts:
            corruption.corrupt(part, corruption.settings.imagenet[severity - 1], Draws(range(len(part))))
    else:
        corruption(images, severity, range(len(images)))


def one_by_one(corruption: Corruption, images: Tensor, severity: int) -> None:
    """The peer: each image by itself."""
    if PEER:
        from imagecorruptions import corrupt

        for image in images.permute(0, 2, 3, 1).contiguous().numpy():
            corrupt(image, severity=severity, corruption_name=corruption.name.removesuffix("_synthetic"))
    else:
        for number in range(len(images)):
            corruption(images[number : number + 1], severity, [number])


def seconds(
    work: Callable[[Corruption, Tensor, int], None], corruption: Corruption, images: Tensor, severity: int
) -> float:
    """An image's share of one call."""
    start = time.perf_counter()
    work(corruption, images, severity)
    return (time.perf_counter() - start) / len(images)


def measured(corruption: Corruption, size: int, severities: list[int], budget: float, rounds: int) -> Rates:
    """Means over severities of the medians of alternating rounds."""
    images = torch.randint(
        0, 256, (max(8, 131072 // size**2), 3, size, size), generator=torch.Generator().manual_seed(0)
    )
    images, found = images.byte(), []
    for severity in severities:
        own(corruption, images, severity)  # tables and matrices are made once
        each = seconds(one_by_one, corruption, images[:1], severity)
        few = images[: max(1, min(len(images), int(budget / each)))]
        pairs = [
            (seconds(own, corruption, images, severity), seconds(one_by_one, corruption, few, severity))
            for _ in range(rounds)
        ]
        found.append([statistics.median(column) for column in zip(*pairs, strict=True)])
    return Rates(*(statistics.mean(column) for column in zip(*found, strict=True)))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224])
    parser.add_argument("--only", nargs="+", help="names of types")
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement of the peer, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if PEER:
        mend_peer()
    peer = "imagecorruptions" if PEER else "one at a time"
    print(f"| type | size | Galago, images/s | {peer}, images/s | ratio |\n|---|--:|--:|--:|--:|")
    for size in arguments.sizes:
        totals = []
        for corruption in benchmark() + extra():
            if arguments.only and corruption.name not in arguments.only:
                continue
            rates = measured(corruption, size, arguments.severities, arguments.seconds, arguments.rounds)
            totals.append(rates)
            print(row(corruption.name, size, rates), flush=True)
        sums = Rates(*(sum(column) for column in zip(*totals, strict=True)))
        print(row("all of them, one after another", size, sums))


def row(name: str, size: int, rates: Rates) -> str:
    """A line of the table."""
    return f"| {name} | {size} | {1 / rates.own:,.0f} | {1 / rates.peer:,.0f} | {rates.peer / rates.own:.1f} |"


if __name__ == "__main__":
    main()
