"""What a distillation loss costs in a training step, beyond the teacher's own forward pass, in one run.

    python benchmarks/distill_step.py
    python benchmarks/distill_step.py --compile --bf16 --only SoftTargets Attention

ResNet-20 learns from ResNet-56 on random 32-pixel images: forward of both, losses, backward and SGD with momentum,
channels last. The variants take turns, a step each; `teacher` is a plain step and the teacher's forward pass with no
loss between them. What counts is each variant's time beyond `teacher` of the same round, as a share of the plain step:
medians and quartiles are shown. Where torchdistill is installed, its step with the same loss takes its turn, too (only
without `--compile`). Memory is the most that a step holds at once beside weights and the optimizer's state.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from qat_step import Step, measured, most_memory
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchdistill_peer import INSTALLED, PEERS, peer_step

from galago.batch import Batch
from galago.distill.attention import Attention
from galago.distill.boundary import BoundarySamples
from galago.distill.contrastive import Contrastive
from galago.distill.correlation import Correlation
from galago.distill.decoupled import Decoupled
from galago.distill.distill import Distill
from galago.distill.hints import Hints
from galago.distill.lesson import Lesson
from galago.distill.logits import SoftTargets
from galago.distill.relations import Relations
from galago.distill.similarity import Similarity
from galago.distill.solution_flow import SolutionFlow
from galago.laws.trial import TinyImages
from galago.method import Forward, Method
from galago.models.resnet import resnet20, resnet56
from galago.tasks.classify import Classify

LESSONS: dict[str, Callable[[], Lesson]] = {
    "SoftTargets": SoftTargets,
    "Decoupled": Decoupled,
    "Correlation": Correlation,
    "Attention": Attention,
    "Hints": Hints,
    "SolutionFlow": SolutionFlow,
    "Relations": Relations,
    "Similarity": Similarity,
    "Contrastive": Contrastive,
    "BoundarySamples": BoundarySamples,
}


class Images(TinyImages):
    """Data of which only the size of an image and the number of images is asked."""

    images = 50000

    def example(self) -> Tensor:
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


class TeacherAlone(Method):
    """The teacher's forward pass and nothing else.

    Args:
        teacher: answers each batch.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher.eval()

    def step(self, batch: Batch, inner: Forward) -> Any:
        with torch.no_grad():
            self.teacher(batch.input)
        return inner(batch)


def step_of(method: Method | None, batch: Batch, bf16: bool, compiled: bool) -> Step:
    """One training step as a function."""
    torch.manual_seed(0)
    model: nn.Module = resnet20().to(batch.input.device).to(memory_format=torch.channels_last)
    methods = [] if method is None else [method.to(batch.input.device).to(memory_format=torch.channels_last)]
    for each in methods:
        model = each.prepare(model, Images())
    learning = [p for module in (model, *methods) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-4, momentum=0.9)
    model.train()
    if compiled:
        model.compile()
    forward = Forward(model, Classify(10), methods)

    def step() -> None:
        with torch.autocast(batch.input.device.type, torch.bfloat16, enabled=bf16):
            loss = forward(batch).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if batch.input.is_cuda:
            torch.cuda.synchronize()

    return step


def table(times: dict[str, list[float]], memory: dict[str, float], title: str) -> Table:
    """Medians; what each costs beyond the teacher's pass, in percent of the plain step of the same round."""
    made = Table("variant", "ms a step", "over plain", "beyond the teacher, %", "quartiles", "MB", title=title)
    for name, taken in times.items():
        beyond = [
            100 * (one - teacher) / plain
            for one, teacher, plain in zip(taken, times["teacher"], times["plain"], strict=True)
        ]
        low, middle, high = statistics.quantiles(beyond, n=4)
        ratio = statistics.median(one / plain for one, plain in zip(taken, times["plain"], strict=True))
        compared = name not in ("plain", "teacher")
        made.add_row(
            name,
            f"{statistics.median(taken):.1f}",
            f"{ratio:.2f}",
            f"{middle:.1f}" if compared else "",
            f"{low:.1f} to {high:.1f}" if compared else "",
            f"{memory[name]:.0f}",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each variant, after three more")
    parser.add_argument("--compile", action="store_true", help="compile the student with torch.compile")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=LESSONS, default=list(LESSONS), help="these losses")
    chosen = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100  # as many networks of one class as there are variants
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # which differ in their hooks
    torch.manual_seed(0)
    images = torch.randn(chosen.batch, 3, 32, 32, device=chosen.device).contiguous(memory_format=torch.channels_last)
    labels = nn.functional.one_hot(torch.randint(10, (chosen.batch,), device=chosen.device), 10).float()
    teacher = resnet56()
    methods: dict[str, Method | None] = {"plain": None, "teacher": TeacherAlone(copy.deepcopy(teacher))}
    methods |= {name: Distill(copy.deepcopy(teacher), [LESSONS[name]()]) for name in chosen.only}
    batch = Batch(images, labels, {"index": torch.arange(chosen.batch, device=chosen.device)})
    steps = {name: step_of(method, batch, chosen.bf16, chosen.compile) for name, method in methods.items()}
    if INSTALLED and not chosen.compile:
        for name in filter(PEERS.__contains__, chosen.only):
            first, second = (
                one.to(images.device).to(memory_format=torch.channels_last) for one in (resnet56(), resnet20())
            )
            steps[f"torchdistill: {name}"] = peer_step(name, first, second, images, labels.argmax(1), chosen.bf16)
    times = measured(steps, chosen.steps)
    memory = {name: most_memory(step, chosen.device) for name, step in steps.items()}
    how = f"{'bf16' if chosen.bf16 else 'fp32'}, {'compiled' if chosen.compile else 'eager'}, {chosen.device}"
    title = f"ResNet-56 teaches ResNet-20, batch {chosen.batch}, {how}, {torch.get_num_threads()} threads"
    Console(width=120).print(table(times, memory, title))


if __name__ == "__main__":
    main()
