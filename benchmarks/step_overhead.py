"""What a training step of each recipe costs, relative to a plain step of the same network: time and memory.

    python benchmarks/step_overhead.py                                  # every recipe of recipes/regularize
    python benchmarks/step_overhead.py recipes/regularize/rsc_resnet20_cifar10.yaml --steps 25
    python benchmarks/step_overhead.py --compile --bf16

Network, task and methods are those of each recipe, halfway through its training; images are random (batch 128), so that
loading costs nothing. A step is forward, losses, backward and SGD with momentum. The variants take turns, a step each,
and what counts is each one's time over that of the plain step of the same round: medians and quartiles. Memory is the
most that a step holds at once beside weights and the optimizer's state. What a method does between epochs is left out,
and what it adds to every batch in the loader too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from qat_step import Step, measured, most_memory
from rich.console import Console
from rich.table import Table
from torch import nn

from galago import recipe
from galago.batch import Batch
from galago.data import Data
from galago.method import Forward

RECIPES = Path(__file__).parents[1] / "recipes" / "regularize"
PLAIN = "plain"


def made(path: Path, root: str) -> Any:
    """Everything that a recipe names, as objects."""
    return recipe.instantiate(recipe.parse(["--config", str(path), "--data.init_args.root", root]))


def step_of(parts: Any, batch: Batch, chosen: argparse.Namespace, plain: bool) -> Step:
    """One training step as a function."""
    torch.manual_seed(0)
    model: nn.Module = parts.model.to(chosen.device, memory_format=torch.channels_last)
    methods = [] if plain else [method.to(chosen.device) for method in parts.methods]
    for method in methods:
        model = method.prepare(model, parts.data)
        method.to(chosen.device)
    for method in methods:
        model = method.epoch(model, parts.epochs // 2)
    learning = [p for module in (model, *methods) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1e-4, momentum=0.9)
    model.train()
    if chosen.compile:
        model.compile()
    forward = Forward(model, parts.task.to(chosen.device).at(0.5), methods, progress=0.5)

    def step() -> None:
        with torch.autocast(batch.input.device.type, torch.bfloat16, enabled=chosen.bf16):
            loss = forward(batch).loss
        torch.autograd.backward(loss)
        apply = optimizer.step
        for method in reversed(methods):
            apply = _around(method, model, apply)
        apply()
        optimizer.zero_grad()
        if batch.input.is_cuda:
            torch.cuda.synchronize()

    return step


def _around(method: Any, model: nn.Module, apply: Any) -> Any:
    return lambda: method.update(model, apply)


def random_batch(data: Data, images: int, device: str) -> Batch:
    """Normalized noise with labels; the places that it names in the training set exist."""
    shape = data.example().shape[1:]
    image = torch.randn(images, *shape, device=device).contiguous(memory_format=torch.channels_last)
    label = torch.randint(len(data.classes), (images,), device=device)
    target = nn.functional.one_hot(label, len(data.classes)).float()
    return Batch(image, target, {"index": torch.arange(images, device=device)})


def row(name: str, path: Path, chosen: argparse.Namespace) -> list[str]:
    """A recipe's line of the table."""
    parts, base = made(path, chosen.data), made(path, chosen.data)
    batch = random_batch(parts.data, chosen.batch, chosen.device)
    steps = {PLAIN: step_of(base, batch, chosen, plain=True), name: step_of(parts, batch, chosen, plain=False)}
    times = measured(steps, chosen.steps)
    ratios = torch.tensor([one / plain for one, plain in zip(times[name], times[PLAIN], strict=True)])
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    memory = {each: most_memory(step, chosen.device) for each, step in steps.items()}
    ratio = memory[name] / memory[PLAIN]
    return [name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{memory[name]:.0f}", f"{ratio:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="by default all of recipes/regularize")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each variant, after three more")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", default="data", help="folder with CIFAR-10's binary files")
    chosen = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100  # as many networks of one class as there are recipes
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # which differ in their hooks
    how = f"{'bf16' if chosen.bf16 else 'fp32'}, {'compiled' if chosen.compile else 'eager'}, {chosen.device}"
    title = f"a training step over a plain one, batch {chosen.batch}, {how}, {torch.get_num_threads()} threads"
    table = Table("recipe", "time over plain", "quartiles", "MB", "memory over plain", title=title)
    for path in chosen.recipes or sorted(RECIPES.glob("*.yaml")):
        table.add_row(*row(path.stem.removesuffix("_resnet20_cifar10"), path, chosen))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
