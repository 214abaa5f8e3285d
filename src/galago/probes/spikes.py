"""Spikes: how many a network fires for an answer, and how well it answers after fewer time steps.

On neuromorphic hardware energy is spent where a spike is, so their number is the customary stand-in for energy. A
spiking network knows nothing of the steps to come: what it would answer if it were stopped early is what its readout
makes of the first steps, so one pass tells all.

    spikes_per_image = (1/N) Σ_images Σ_neurons Σ_t S        firing_rate = spikes_per_image / (neurons · N_t)

When to use it: on networks of `galago.models.spiking`, to see whether fewer steps would do and whether neurons are dead
(a rate near 0) or of no use (near 1). It costs one pass over some images. A network that does not spike has no such
numbers, nor has a file, whose spikes cannot be seen: measure the network.

Recipe: recipes/distill/spikes_teacher_mnist.yaml.

Design choices: spikes of all LIF neurons count, those of the output too, but not those of a rate-coded input, which are
the image's. Earlier answers are the task's metrics on the scores that the last `SpikeCount` would have given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.layers import removing
from galago.models.lif import LIF, SpikeCount
from galago.probe import Outputs, Probe, TaskMetrics, device_of, evaluating
from galago.task import Task


class Record:
    """What neurons and readout did while images went through a network.

    Args:
        steps: after how many time steps answers are kept; none for a half and a quarter of them.
    """

    def __init__(self, steps: Sequence[int] | None) -> None:
        self.steps = steps
        self.spikes: dict[nn.Module, list[float]] = {}  # of each layer: fired, could have been fired
        self.early: dict[int, list[Tensor]] = {}  # scores by number of steps

    def count(self, neurons: nn.Module, inputs: Any, output: Tensor) -> None:
        """A hook for LIF neurons."""
        fired, possible = self.spikes.get(neurons, [0.0, 0.0])
        self.spikes[neurons] = [fired + float(output.sum(dtype=torch.float64)), possible + output.numel()]

    def stop_early(self, readout: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """A hook for a readout."""
        assert isinstance(readout, SpikeCount)
        for steps in self.asked(inputs[0].shape[-1]):
            scores = readout.forward(*(part[..., :steps] for part in inputs))
            self.early.setdefault(steps, []).append(scores.float().cpu())

    def asked(self, full: int) -> Sequence[int]:
        """Numbers of steps below `full`.

        Raises:
            UserError: the network never runs for so many.
        """
        if self.steps is None:
            return sorted({full // 4, full // 2} - {0})
        if max(self.steps, default=0) > full:
            raise UserError(f"Spikes: steps names {max(self.steps)}, but the network runs for {full}; give no more")
        return self.steps


class Spikes(Probe):
    """`spikes_per_image`, `firing_rate`, and each of the task's metrics after fewer steps (`accuracy_after_8_steps`).

    Args:
        steps: after how many time steps; none for a half and a quarter of the network's.
        images: how many test images are measured.
    """

    def __init__(self, steps: Sequence[int] | None = None, images: int = 1000) -> None:
        if steps is not None and min(steps, default=1) < 1:
            raise UserError(f"Spikes: steps names {min(steps)}; give numbers of time steps, 1 or more")
        if images < 1:
            raise UserError(f"Spikes: images is {images}; give 1 or more")
        self.steps, self.images = steps, images

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        if not any(isinstance(module, LIF) for module in deployed.modules()):
            return {}
        record = Record(self.steps)
        with recording(deployed, record), evaluating(deployed), torch.inference_mode():
            target = self._shown(deployed, data)
        fired, possible = (sum(column) for column in zip(*record.spikes.values(), strict=True))
        numbers = {"spikes_per_image": fired / len(target), "firing_rate": fired / possible}
        for steps, scores in record.early.items():
            found = TaskMetrics().score(Outputs(torch.cat(scores), target), task)
            numbers |= {f"{name}_after_{steps}_steps": value for name, value in found.items()}
        return numbers

    def _shown(self, deployed: nn.Module, data: Data) -> Tensor:
        """Runs the first test images; their targets."""
        device, targets, left = device_of(deployed), [], self.images
        for batch in data.test():
            deployed(batch.input[:left].to(device))
            targets.append(batch.target[:left])
            if (left := left - len(targets[-1])) <= 0:
                break
        return torch.cat(targets)


@contextmanager
def recording(deployed: nn.Module, record: Record) -> Iterator[None]:
    """Writes down what neurons and the last readout do, as long as the `with` lasts."""
    modules = list(deployed.modules())
    handles = [module.register_forward_hook(record.count) for module in modules if isinstance(module, LIF)]
    readouts = [module for module in modules if isinstance(module, SpikeCount)]
    handles += [readout.register_forward_hook(record.stop_early) for readout in readouts[-1:]]
    with removing(handles):
        yield
