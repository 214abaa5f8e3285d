"""What a distilled network's features are worth elsewhere: a linear classifier of other images on top of them.

    python benchmarks/distillers.py --seeds 0           # the networks
    python benchmarks/distill_transfer.py

Networks of `benchmarks/distillers.py`, frozen, and `no training`, the same network with random weights, show what the
layer in front of their classifier makes of handwritten digits (MNIST, `--per-class` images of each for fitting, all for
the test) and of blood cells (`recipes/bccd/crop_cells.py`, all training crops for fitting), stretched to 32 pixels.
Features are standardized and told apart by logistic regression, whose strength is chosen on five folds of the images
for fitting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from distillers import METHODS
from rich.console import Console
from rich.table import Table
from runs import measured, spread
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from galago.data import Data, Loader, Normalize
from galago.datasets.idx import MNIST
from galago.datasets.image_folder import ImageFolder
from galago.models.resnet import resnet20
from galago.outside import fit
from galago.probe import Deployed
from galago.probes.embedding import embedding
from galago.run import load, normalization_of
from galago.tasks.classify import Classify

SHAPE = (3, 32, 32)
STRENGTHS = [0.001, 0.01, 0.1, 1.0]
UNTRAINED = "no training"


@torch.no_grad()
def features(network: Deployed, loader: Loader) -> tuple[Tensor, Tensor]:
    """What a network makes of images, N×d, and their classes, N."""
    seen, labels = [], []
    with embedding(network) as embed:
        for batch in loader:
            seen.append(embed(fit(batch.input, SHAPE)))
            labels.append(batch.target.argmax(1))
    return torch.cat(seen), torch.cat(labels)


def accuracy(network: Deployed, data: Data) -> float:
    """In percent, of a linear classifier on the features, on test images."""
    fitting, labels = features(network, data.plain())
    classifier = LogisticRegressionCV(
        Cs=STRENGTHS, l1_ratios=(0,), cv=5, scoring="accuracy", max_iter=1000, use_legacy_attributes=False
    )
    fitted = make_pipeline(StandardScaler(), classifier).fit(fitting.numpy(), labels.numpy())
    test, truth = features(network, data.test())
    return 100 * float(fitted.score(test.numpy(), truth.numpy()))


def networks(name: str, chosen: argparse.Namespace) -> list[Deployed]:
    """A method's, of all seeds that are trained, with what images go through in front of them."""
    if name == UNTRAINED:
        return [untrained(seed) for seed in chosen.seeds]
    runs = [Path(chosen.runs) / f"{name}_seed{seed}" for seed in chosen.seeds]
    loaded = [load(run) for run in runs if measured(run)]
    return [Deployed(network, normalization_of(network), Classify(10)).eval() for network in loaded]


def untrained(seed: int) -> Deployed:
    """ResNet-20 as it begins."""
    torch.manual_seed(seed)
    return Deployed(resnet20(), Normalize([0.5] * 3, [0.25] * 3), Classify(10)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--per-class", type=int, default=100, help="digits for fitting")
    parser.add_argument("--runs", default="runs/distillers/resnet20_3", help="where the networks are")
    parser.add_argument("--mnist", default="../shared/data/mnist", help="folder with MNIST's files")
    parser.add_argument("--cells", default="data/cells", help="folder of recipes/bccd/crop_cells.py")
    chosen = parser.parse_args()
    sets: dict[str, Data] = {
        "digits: accuracy %": MNIST(chosen.mnist, per_class=chosen.per_class, batch_size=200, augment=[]),
        "blood cells: accuracy %": ImageFolder(chosen.cells, size=SHAPE[-1], batch_size=200, augment=[]),
    }
    made = Table("features of", *sets)
    for name in (UNTRAINED, *chosen.only):
        if found := networks(name, chosen):
            made.add_row(name, *(spread([accuracy(one, data) for one in found], digits=1) for data in sets.values()))
    Console(width=120).print(made)


if __name__ == "__main__":
    main()
