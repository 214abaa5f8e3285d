"""What a person sees while a network trains: a bar with time left and images a second; plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import nn

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.probe import Deployed, Probe, measure
from galago.trainer import Learner

Item = TypeVar("Item")

# Away from a terminal, in a log, lines need not fit a window.
console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140)


class TrainingMonitor:
    """Measures the network on the validation images after each epoch, and shows how training goes.

    Args:
        learner: whose network is measured.
        data: gives the validation images.
        probes: what is measured.
        watch: the number that decides which epoch was best.
        epochs: how many there will be.
        processes: that each train on a batch of `data.batch_size`, which may be another from epoch to epoch.
    """

    def __init__(
        self, learner: Learner, data: Data, probes: Sequence[Probe], watch: str, epochs: int, processes: int
    ) -> None:
        self.learner, self.data, self.probes, self.watch = learner, data, probes, watch
        self.epochs, self.processes = epochs, processes
        self.loss, self.since, self.batches = float("nan"), time.perf_counter(), 0
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} images/s  loss {task.fields[loss]:.3f}  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self.shown = self.bar.add_task("", total=None, epoch=0, epochs=epochs, rate=0.0, loss=float("nan"))

    def __enter__(self) -> TrainingMonitor:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def prepared(self, methods: Sequence[Method]) -> None:
        """Shows what each method changed."""
        for summary in filter(None, (method.summary() for method in methods)):
            console.print(summary)

    def stepped(self, epoch: int, batch: int, of: int, numbers: dict[str, float]) -> None:
        """After a batch: moves the bar, whose end is the end of the whole training."""
        self.loss = numbers.get("loss", self.loss)
        self.batches += 1
        self.bar.update(
            self.shown,
            completed=epoch * of + batch,
            total=self.epochs * of,
            epoch=epoch + 1,
            rate=self.rate(),
            loss=self.loss,
        )

    def rate(self) -> float:
        """Training images a second since the epoch began."""
        images = self.batches * self.data.batch_size * self.processes
        return images / max(time.perf_counter() - self.since, 1e-9)

    def measured(self, epoch: int) -> tuple[dict[str, float], float]:
        """After an epoch: measures and says what came out."""
        rate = self.rate()
        network = self.learner.measured
        numbers = measure_network(network, self.learner, self.data, self.probes)
        if self.watch not in numbers:
            raise UserError(f"watch: nothing measures {self.watch!r}; the probes give {', '.join(numbers)}")
        self.learner.train()
        found = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        say(f"epoch {epoch + 1}/{self.epochs}  loss {self.loss:.4f}  {rate:.0f} images/s  {found}")
        self.since, self.batches = time.perf_counter(), 0
        return numbers | {"images_per_second": rate}, numbers[self.watch]


def measure_network(network: nn.Module, learner: Learner, data: Data, probes: Sequence[Probe]) -> dict[str, float]:
    """Every probe's numbers on the validation images; never compiled, as a new graph would cost more than it saves."""
    deployed = Deployed(network, learner.normalize, learner.task)
    with torch.compiler.set_stance("force_eager"):
        return measure(probes, deployed, learner.task, data, data.validation())


def say(text: str) -> None:
    """A line for the person watching, on standard error, once for all processes; standard output is for results."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    console.print(text, markup=False, soft_wrap=True)


def watched(steps: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """The same steps, with a bar while they last, for work that takes long before or after training.

    Args:
        steps: what is worked on, one after another.
        what: is done, for the bar.
        total: how many there are, where `steps` does not know.
    """
    return track(steps, what, total, console=console, transient=True, disable=not sys.stderr.isatty())
