"""What subclass distillation (OSKD) brings: do the kinds within a class come apart, and at what accuracy?

    python benchmarks/subclasses.py                      # two minutes
    python benchmarks/subclasses.py --seeds 10 --epochs 60

Ten handwritten digits are learned under two labels, even and odd, by a small network; the digits themselves stay
hidden. Purity is the share of test images whose nearest test image with the same label, by embedding, is of the same
digit. The embedding is what goes into the classifier: of both signs, or behind a ReLU as in most networks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data, Loader
from galago.datasets.digits import Digits
from galago.distill.subclass import SubclassDistillation, nearest, partners, unit
from galago.layers import tap
from galago.method import Method
from galago.tasks.classify import Classify
from galago.trainer import Learner, prepare

EVEN_OR_ODD = torch.eye(2).repeat(5, 1)  # of each digit
RATE = 0.1


class EvenOrOdd(Data):
    """The digits, of which only that is told."""

    classes = ("even", "odd")

    def __init__(self, seed: int) -> None:
        self.digits, self.seed, self.batch_size = Digits(batch_size=128, augment=[]), seed, 128
        self.digits.seed, self.normalize = seed, self.digits.normalize

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        return told(self.digits.train(epoch, start))

    def validation(self) -> Loader:
        return told(self.digits.validation())

    def example(self) -> Tensor:
        return self.digits.example()


def told(batches: Iterable[Batch]) -> list[Batch]:
    return [batch._replace(target=batch.target @ EVEN_OR_ODD) for batch in batches]


def network(rectified: bool) -> nn.Sequential:
    embedding = nn.Sequential(nn.Linear(64, 32), nn.ReLU() if rectified else nn.Identity())
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), embedding, nn.Linear(32, 2))


def trained(rectified: bool, methods: list[Method], seed: int, epochs: int) -> Learner:
    torch.manual_seed(seed)
    data = EvenOrOdd(seed)
    learner = Learner(network(rectified), Classify(2), methods, data.normalize)
    prepare(learner, data, None)
    optimizer = torch.optim.SGD(learner.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    for progress, batch in steps(data, epochs):
        optimizer.param_groups[0]["lr"] = RATE * (1 - progress)
        optimizer.zero_grad()
        learner(batch, progress).loss.backward()
        optimizer.step()
    return learner.eval()


def steps(data: Data, epochs: int) -> Iterator[tuple[float, Batch]]:
    for epoch in range(epochs):
        batches = list(data.train(epoch))
        for number, batch in enumerate(batches):
            yield (epoch + number / len(batches)) / epochs, batch


@torch.no_grad()
def measured(learner: Learner) -> tuple[float, float]:
    """Accuracy and purity on the test images, in percent."""
    given = list(Digits(augment=[]).test())
    image, digit = torch.cat([batch.input for batch in given]), torch.cat([batch.target for batch in given])
    label = digit @ EVEN_OR_ODD
    with tap(learner.model, "3") as embedding:
        right = learner.model(learner.normalize(image)).argmax(1) == label.argmax(1)
    phi = unit(embedding.value)
    neighbor = nearest(torch.cdist(phi, phi), partners(label), 1).float().argmax(1)
    pure = digit.argmax(1)[neighbor] == digit.argmax(1)
    return 100 * float(right.float().mean()), 100 * float(pure.float().mean())


def alone() -> list[Method]:
    return []


def with_oskd() -> list[Method]:
    return [SubclassDistillation()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    table = Table("embedding", "trained with", "accuracy %", "purity %", title=f"{options.seeds} seeds")
    for rectified in (False, True):
        for name, methods in (("labels", alone), ("labels and OSKD", with_oskd)):
            found = [measured(trained(rectified, methods(), seed, options.epochs)) for seed in range(options.seeds)]
            columns = [torch.tensor(column) for column in zip(*found, strict=True)]
            shown = [f"{column.mean():.1f} ± {column.std():.1f}" for column in columns]
            table.add_row("behind a ReLU" if rectified else "of both signs", name, *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
