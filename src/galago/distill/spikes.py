"""Distilling spikes: a spiking network learns when the neurons of a larger one fire, not only which class they name.

Ravi Kumar Kushawaha, Saurabh Kumar, Biplab Banerjee, Rajbabu Velmurugan, "Distilling Spikes: Knowledge Distillation in
Spiking Neural Networks", ICPR 2020, arXiv:2005.00288.

Teacher and student both spike; the student imitates the trains of spikes O of the teacher's output neurons. Through a
network of a size in between, a small student can learn from a much larger teacher.

    SpikeTrains:   L = mean (O^student - O^teacher)²,   O in {0, 1}, neurons × N_t
    SpikeWindows:  L = mean (c^student - c^teacher)²,   c_j = (1/w) Σ_{t = js+1 … js+w} O[t],   complete windows only
    SpikeRates:    L = T² KL(softmax(n^teacher / T) ‖ softmax(n^student / T)),   n = Σ_t O
    in all         (1 - λ) L_task + λ L

Windows forgive spikes that come a little early or late: with w = s = 1 they are `SpikeTrains`, with w = N_t they
compare rates alone.

When: for spiking students (`galago.models.spiking`) with as many time steps as their teacher. It costs the teacher's
forward pass, all its time steps, in every training step. A teacher that does not spike has no trains; it teaches a
spiking student through `galago.distill.logits.SoftTargets`, as its scores are compared with scaled counts.

Usual setting (the defaults): λ 0.5 (`task_weight` 0.5 in `Distill`), w 4, s 1, T 4, 16 time steps, Adam at 1e-3 for 50
epochs. The intermediate network has about the geometric mean of the others' parameters. Means over trains and windows
are small next to the cross-entropy: in short trainings a weight of 10 is what makes them felt.

Recipe: recipes/distill/spikes_student_mnist.yaml, from spikes_intermediate_mnist.yaml, from spikes_teacher_mnist.yaml.

Chosen here: no code and no formulas were at hand but the abstract. That full trains and sliding windows are compared is
recalled; `SpikeRates`, every formula and every number are design choices. Where the input is rate-coded both networks
must see the same spikes, or their trains cannot be compared: `galago.models.spiking.RateCode` is a fixed function of
the image, so give both networks the same `rate_coded`. In a hidden layer the neurons of `SpikeRates` are classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from galago.distill.divergence import softened_divergence
from galago.distill.lesson import Lesson, Seen, View
from galago.errors import UserError
from galago.schedule import Schedule


def train_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two spike trains N×…×N_t, a scalar: for spikes, the share that differs.

    >>> train_distance(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 1.0]]))
    tensor(0.2500)
    """
    return (student - teacher).square().mean()


def windowed(spikes: Tensor, window: int, stride: int) -> Tensor:
    """Means c over windows of `window` steps, `stride` apart: N×…×N_t to N×…×J, J = ⌊(N_t - w) / s⌋ + 1.

    >>> windowed(torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]]), window=2, stride=2)
    tensor([[0.5000, 0.5000]])
    """
    return spikes.unfold(-1, window, stride).mean(-1)


def window_distance(student: Tensor, teacher: Tensor, window: int, stride: int) -> Tensor:
    """Mean squared difference of two spike trains N×…×N_t after `windowed`, a scalar."""
    return train_distance(windowed(student, window, stride), windowed(teacher, window, stride))


def rate_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T² KL` of the softened counts of two spike trains N×…×N_t, averaged over the batch, a scalar.

    >>> early, late = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
    >>> rate_divergence(early, late, temperature=4.0)
    tensor(0.)
    """
    return softened_divergence(student.sum(-1).flatten(1), teacher.sum(-1).flatten(1), temperature)


class SpikeLesson(Lesson, ABC):
    """What the three have in common: trains of the same neurons and time steps in both networks."""

    def fit(self, student: View, teacher: View) -> None:
        for own, its, *pair in zip(self.paths, self.teacher_paths, student.features, teacher.features, strict=True):
            for path, train, whose in zip((own, its), pair, ("model", "teacher"), strict=True):
                self._require_spikes(path, train, whose)
            (*neurons, steps), (*wanted, goal) = (train.shape[1:] for train in pair)
            if steps != goal:
                raise UserError(
                    f"{type(self).__name__}: layer {own!r} of the model has {steps} time steps, {its!r} of the teacher"
                    f" {goal}; give both networks the same number of steps"
                )
            if neurons != wanted:
                raise UserError(
                    f"{type(self).__name__}: layer {own!r} of the model has {by(neurons)} neurons, {its!r} of the"
                    f" teacher {by(wanted)}; name layers of equal size, as output layers are"
                )

    def _require_spikes(self, path: str, train: Tensor, whose: str) -> None:
        if train.ndim < 3 or not ((train == 0) | (train == 1)).all():
            raise UserError(
                f"{type(self).__name__}: layer {path!r} of the {whose} gives no spikes over time (N×…×steps of 0 and"
                " 1); name LIF neurons, 'output' in SpikingNet. A teacher that does not spike teaches by SoftTargets"
            )

    @abstractmethod
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar of two spike trains N×…×N_t."""

    def forward(self, seen: Seen) -> Tensor:
        pairs = zip(seen.student.features, seen.teacher.features, strict=True)
        return torch.stack([self.distance(own, its) for own, its in pairs]).sum()


class SpikeTrains(SpikeLesson):
    """The teacher's spikes, each at its time.

    Args:
        weight: λ, of this loss, or a schedule of it.
        layers: LIF neurons of the model, by path; those of the output.
        teacher_layers: of the teacher, as many; the same as `layers` where none are named.
    """

    def __init__(
        self,
        weight: float | Schedule = 0.5,
        layers: Sequence[str | int] = ("output",),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return train_distance(student, teacher)


class SpikeWindows(SpikeLesson):
    """How often the teacher's neurons fire in windows that slide over time.

    Args:
        window: w, time steps that are taken together.
        stride: s, time steps from one window to the next.
        weight: λ, of this loss, or a schedule of it.
        layers: LIF neurons of the model, by path; those of the output.
        teacher_layers: of the teacher, as many; the same as `layers` where none are named.
    """

    def __init__(
        self,
        window: int = 4,
        stride: int = 1,
        weight: float | Schedule = 0.5,
        layers: Sequence[str | int] = ("output",),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)
        if window < 1 or stride < 1:
            raise UserError(f"SpikeWindows: window {window}, stride {stride}; give 1 or more, usually 4 and 1")
        self.window, self.stride = window, stride

    def fit(self, student: View, teacher: View) -> None:
        super().fit(student, teacher)
        for path, train in zip(self.paths, student.features, strict=True):
            if self.window > train.shape[-1]:
                raise UserError(
                    f"SpikeWindows: window is {self.window}, layer {path!r} has {train.shape[-1]} time steps; give no"
                    " more than these"
                )

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return window_distance(student, teacher, self.window, self.stride)


class SpikeRates(SpikeLesson):
    """The teacher's softened distribution of spike counts over the classes.

    Args:
        temperature: T, how much both distributions are softened.
        weight: λ, of this loss, or a schedule of it.
        layers: LIF neurons of the model, by path; those of the output.
        teacher_layers: of the teacher, as many; the same as `layers` where none are named.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float | Schedule = 0.5,
        layers: Sequence[str | int] = ("output",),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)
        if temperature <= 0:
            raise UserError(f"SpikeRates: temperature is {temperature}; give a positive number, usually 4")
        self.temperature = temperature

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rate_divergence(student, teacher, self.temperature)


def by(sizes: Sequence[int]) -> str:
    """Sizes as text, `32×7×7`."""
    return "×".join(map(str, sizes))
