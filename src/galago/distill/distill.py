"""`Distill`: a frozen teacher, run once in a step, and any number of lessons that pull the model towards it.

    L = γ L_task + Σ_l w_l(progress) L_l(model, teacher)

A lesson is one paper's loss (`galago.distill.lesson`): the teacher's probabilities (`logits`, `decoupled`,
`correlation`), also of images near its decision boundary (`boundary`), its features (`hints`, `attention`,
`solution_flow`, `contrastive`), how its images relate to each other (`relations`, `similarity`). They share the
teacher's forward pass, so that a second one costs next to nothing.

A privileged view: where `view` names an entry of the batch's `extra`, the teacher sees that in the input's place, such
as the whole image where a part of it is hidden from the model (`galago.augment.occlude` keeps it as `full`).

Chosen here: the teacher sees the batch as the model saw it, mixed images included, so its answer is about the same
image. γ weighs the task's own losses only, not those of other methods. Where an output is a dict, its entry `main`
counts. Where the teacher has an output for each class and the model one more, that one abstains
(`galago.tasks.abstain`) and is not compared. The teacher stays in evaluation mode, without gradients (`no_grad` and not
`inference_mode`, whose tensors cannot take part in the model's gradient), and is kept in the checkpoint: an exact
resume then does not depend on whether the teacher's own run has changed in the meantime. Adapters train with the model.
The finished model holds nothing of all this. Everything that can be wrong with names and shapes is wrong before the
first step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Self

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.distill.lesson import Lesson, Seen, View, at
from galago.distill.teacher import (
    AskedByBatch,
    answers,
    cost,
    require_same_normalization,
    require_teachable,
    scores,
)
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized
from galago.stages import resolved, stages
from galago.taps import Taps, unnoticed


class Distill(Method):
    """Pulls the model towards a frozen teacher, in as many ways as there are lessons.

    Args:
        teacher: a trained network for the same classes and the same normalization.
        lessons: the losses between the two.
        task_weight: of the task's own losses; 0 learns from the teacher alone.
        view: entry of the batch's `extra` that the teacher sees, such as `full`; None for what the model saw.
    """

    def __init__(
        self, teacher: nn.Module, lessons: Sequence[Lesson], task_weight: float = 1.0, view: str | None = None
    ) -> None:
        super().__init__()
        if not lessons:
            raise UserError("Distill: lessons is empty; name at least one, such as galago.distill.logits.SoftTargets")
        if isinstance(teacher, AskedByBatch) and any(lesson.layers for lesson in lessons):
            raise UserError(
                f"Distill: a {type(teacher).__name__} has no features; give its teacher itself to lessons on layers"
            )
        self.teacher = teacher.requires_grad_(False).eval()
        self.lessons, self.task_weight, self.view = nn.ModuleList(lessons), task_weight, view
        self.names = names_of(lessons)
        self._taps: tuple[Taps, Taps] | None = None
        self._cost = ""
        self._classes: int | None = None  # outputs of the model that are compared; all of them

    def train(self, mode: bool = True) -> Self:
        """As usual, except that the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing in the model but adds hooks; adapters are built for the shapes of both networks.

        Raises:
            UserError: the teacher cannot teach this model, or layers are not there or cannot be compared.
        """
        require_same_normalization(self.teacher, data.normalize)
        if isinstance(self.teacher, AskedByBatch):
            self.teacher.images = data.images
        device = device_of(model)
        image = normalized(data, data.example()[:1], device)
        self.teacher.to(device)
        with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            self._resolve(model, image)
            pairs = self._pairs()
            self._taps = Taps(model, [own for _, own, _ in pairs]), Taps(self.teacher, [its for _, _, its in pairs])
            said = scores(model(image)), scores(self.teacher(image))
            if said[1].shape[1] == len(data.classes) == said[0].shape[1] - 1:
                self._classes = len(data.classes)
                said = said[0][:, : self._classes], said[1]
            require_teachable(*said)
            for taps, whose in zip(self._taps, ("the model", "the teacher"), strict=True):
                taps.check(whose)
            for lesson in self._lessons():
                lesson.images = data.images
                lesson.fit(*self._views(lesson, *said))
                lesson.to(device)
            self._cost = cost(self.teacher, model, image)
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        with torch.no_grad():
            own = inner.task.losses(step.output, step.batch).keys()  # other methods' losses keep their weights
        losses = {name: self.task_weight * loss if name in own else loss for name, loss in step.losses.items()}
        taught = self.taught(inner.model, scores(step.output), step.batch, inner.progress)
        return step._replace(losses=losses).add(**taught)

    def taught(self, model: nn.Module, said: Tensor, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Every lesson's weighted loss, right after the model has seen a batch.

        Args:
            model: that learns.
            said: its scores, N×K.
            batch: as the model saw it.
            progress: of the training, 0 to 1.
        """
        said = said[:, : self._classes]
        with torch.no_grad():
            wanted = answers(self.teacher, self._shown(batch))
        losses = {}
        for name, lesson in zip(self.names, self._lessons(), strict=True):
            student, teacher = self._views(lesson, said, wanted)
            student = student._replace(ask=partial(ask, model))
            teacher = teacher._replace(ask=partial(ask, self.teacher))
            losses[name] = at(lesson.weight, progress) * lesson(Seen(student, teacher, batch, progress))
        return losses

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the hooks away."""
        if self._taps is not None:
            self._taps[0].remove(model)
            self._taps[1].remove(self.teacher)
        return model

    def summary(self) -> Table | str:
        """What the teacher costs; which layers are compared, with their shapes and what stands between them."""
        if not (pairs := self._pairs()):
            return self._cost
        table = Table("lesson", "layer of the model", "shape", "layer of the teacher", "shape", "between")
        table.caption = self._cost
        between = [note for lesson in self._lessons() for note in lesson.adapters()]
        for (lesson, own, its), note in zip(pairs, between, strict=True):
            cells = [
                (path, by_sizes(taps.values[path])) for path, taps in zip((own, its), self._taps or (), strict=True)
            ]
            table.add_row(type(lesson).__name__, *cells[0], *cells[1], note)
        return table

    def _shown(self, batch: Batch) -> Batch:
        """A batch as the teacher sees it."""
        if self.view is None:
            return batch
        if self.view not in batch.extra:
            kept = ", ".join(batch.extra) or "nothing"
            raise UserError(f"Distill: view is {self.view!r}, but a batch keeps {kept}; list a method that keeps it")
        return batch._replace(input=batch.extra[self.view])

    def _lessons(self) -> list[Lesson]:
        return [lesson for lesson in self.lessons if isinstance(lesson, Lesson)]

    def _pairs(self) -> list[tuple[Lesson, str, str]]:
        """Every lesson's layers, two by two."""
        return [
            (lesson, own, its)
            for lesson in self._lessons()
            for own, its in zip(lesson.paths, lesson.teacher_paths, strict=True)
        ]

    def _resolve(self, model: nn.Module, image: Tensor) -> None:
        """Numbers of stages become paths."""
        asked = [layer for lesson in self._lessons() for layer in (*lesson.layers, *lesson.teacher_layers)]
        numbered = any(isinstance(layer, int) for layer in asked)
        own, its = (stages(network, image) if numbered else [] for network in (model, self.teacher))
        for lesson in self._lessons():
            name = type(lesson).__name__
            lesson.paths = resolved(lesson.layers, own, f"{name}: the model")
            lesson.teacher_paths = resolved(lesson.teacher_layers, its, f"{name}: the teacher")

    def _views(self, lesson: Lesson, said: Tensor, wanted: Tensor) -> tuple[View, View]:
        """What the lesson compares, of what both networks gave last."""
        own, its = (taps.values for taps in self._taps) if self._taps is not None else ({}, {})
        return (
            View(said, [of_first_branch(own[path], len(said)).float() for path in lesson.paths]),
            View(wanted, [its[path].detach().float() for path in lesson.teacher_paths]),
        )


def ask(network: nn.Module, images: Tensor) -> Tensor:
    """A network's scores of further images, which no tap notices."""
    with unnoticed():
        return scores(network(images))


def names_of(lessons: Sequence[Lesson]) -> list[str]:
    """What each lesson's loss is called in the log: its class in small letters, numbered where it comes again."""
    seen: Counter[str] = Counter()
    names = []
    for lesson in lessons:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(lesson).__name__).lower()
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def of_first_branch(feature: Tensor, count: int) -> Tensor:
    """What is there of the images that were asked for; a network in branches puts the others' features behind."""
    return feature if len(feature) == count else feature[:count]


def by_sizes(tensor: Tensor) -> str:
    """C×H×W, as text."""
    return "×".join(map(str, tensor.shape[1:]))
