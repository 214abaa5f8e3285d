"""What is measured, on a model or on an exported file.

A probe is given a *deployed* network: a module from raw images (uint8, N×C×H×W) to the raw output, whether that is
a PyTorch model behind its normalization (`Deployed`) or a file run by an engine (`galago.deploy.runtime`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data, Loader
from galago.task import Task, scores_of

Numbers = TypeVar("Numbers")

TEST, VALIDATION = "test", "validation"  # views that any probe may ask for


class Deployed(nn.Module):
    """A network behind its normalization and in front of its decoding: what is measured, and what is exported.

    Args:
        network: from normalized input to raw output.
        normalize: from raw images to normalized input.
        task: whose `decode` gives what a user sees.
    """

    def __init__(self, network: nn.Module, normalize: nn.Module, task: Task) -> None:
        super().__init__()
        self.normalize, self.network, self.task = normalize, network, task

    def forward(self, image: Tensor) -> Any:
        """Raw images to the raw output (class scores N×K in classification)."""
        return self.network(self.normalize(image))

    def decode(self, output: Any) -> Any:
        """What a user sees of a raw output."""
        return self.task.decode(output)


class Probe(ABC):
    """Numbers about a deployed network. Leaves its weights, its mode and the random state as they were."""

    @abstractmethod
    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        """Name to value. Names carry the unit where there is one (`latency_ms`)."""


class Outputs(NamedTuple):
    """Everything a network said about a set of images, on the CPU."""

    output: Tensor  # N×…, float32
    target: Tensor  # N×…


class OutputProbe(Probe):
    """A probe that needs nothing but outputs and targets, so that several share one pass over the data."""

    @abstractmethod
    def score(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """Name to value, from stored outputs."""

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        return self.score(collect(deployed, data.test()), task)


class ViewsProbe(Probe):
    """A probe that needs outputs on several sets of images, each of which can be stored and shared by its name.

    A view's name says all that decides its images (`corrupted/fog/3`), apart from the data set: whatever has been
    stored under it is not computed again. `TEST` and `VALIDATION` are the data set's own images.
    """

    @abstractmethod
    def views(self, data: Data) -> dict[str, Loader]:
        """The sets of images by name; cheap to make, nothing is loaded before a view is iterated."""

    @abstractmethod
    def score(self, outputs: Mapping[str, Outputs], task: Task) -> dict[str, float]:
        """Name to value, from stored outputs of each view."""

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        return self.score({name: collect(deployed, view) for name, view in self.views(data).items()}, task)


class TaskMetrics(OutputProbe):
    """The task's own metrics (`accuracy`, …); what every run measures."""

    def score(self, outputs: Outputs, task: Task) -> dict[str, float]:
        metrics = task.metrics()
        for metric in metrics.values():
            metric.distributed_available_fn = lambda: False  # these are all the images: nothing is to be added
        metrics.update(task.decode(outputs.output), outputs.target)
        return {name: float(value) for name, value in metrics.compute().items()}


def collect(deployed: nn.Module, batches: Loader) -> Outputs:
    """Runs every batch once, in evaluation mode, and keeps outputs and targets."""
    return collect_each([deployed], batches)[0]


def collect_each(networks: Sequence[nn.Module], batches: Loader) -> list[Outputs]:
    """What each of several deployed networks says about the same batches, which are loaded once."""
    found: list[list[Tensor]] = [[] for _ in networks]
    targets = []
    with ExitStack() as modes, torch.inference_mode():
        for network in networks:
            modes.enter_context(evaluating(network))
        for batch in batches:
            targets.append(batch.target.cpu())
            for network, outputs in zip(networks, found, strict=True):
                outputs.append(network(batch.input.to(device_of(network))).float().cpu())
    return [Outputs(torch.cat(outputs).clone(), torch.cat(targets).clone()) for outputs in found]


def spread(loader: Loader, images: int) -> list[Batch]:
    """So many images, evenly from the first to the last, in batches; all where there are no more.

    Args:
        loader: batches of equal size, the last may be smaller.
        images: how many.
    """
    chosen, position, total = [], 0, 0
    for batch in loader:
        total = total or len(batch.input) * len(loader)
        places = torch.arange(position, position + len(batch.input))
        kept = (places * images) % total < images
        position += len(batch.input)
        if kept.any():
            extra = {name: value[kept] for name, value in batch.extra.items()}
            chosen.append(Batch(batch.input[kept], batch.target[kept], extra))
    return chosen


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode as long as the `with` lasts; afterwards each part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def measure(
    probes: Sequence[Probe], deployed: nn.Module, task: Task, data: Data, batches: Loader | None = None
) -> dict[str, float]:
    """Every probe's numbers in one dict; the data are passed through the network once for all `OutputProbe`s.

    Args:
        probes: what to measure.
        deployed: from raw images to raw output.
        task: judges outputs.
        data: where images come from.
        batches: which images the `OutputProbe`s use; `data.test()` by default.

    Raises:
        ValueError: two probes give the same name.
    """
    numbers: dict[str, float] = {}
    stored: Outputs | None = None
    for probe in probes:
        if isinstance(probe, OutputProbe):
            stored = stored or collect(deployed, data.test() if batches is None else batches)
            found = probe.score(stored, task)
        else:
            found = probe(deployed, task, data)
        if twice := numbers.keys() & found.keys():
            raise ValueError(f"{type(probe).__name__} measures {sorted(twice)} a second time; list each probe once")
        numbers.update(found)
    return numbers


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors live; the CPU for one that has none."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def has_gradients(deployed: nn.Module, image: Tensor) -> bool:
    """Whether what a network says can be differentiated with respect to raw images."""
    if not isinstance(deployed, Deployed):
        return False
    with torch.enable_grad():
        return scores_of(deployed((image / 255).requires_grad_())).requires_grad


def normalized(data: Data, image: Tensor, device: torch.device) -> Tensor:
    """Raw images as a network on a device sees them, wherever both are."""
    seen: Tensor = data.normalize(image.to(device_of(data.normalize))).to(device)
    return seen


def shared(numbers: Numbers) -> Numbers:
    """The first process's numbers in all of them, so that all choose alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        held = [numbers]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]
    return numbers
