"""`train`: what a recipe calls. Everything a recipe may say is an argument of this function."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import nn
from torch.optim import SGD

from galago.console import TrainingMonitor, say
from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.probe import Deployed, Probe, TaskMetrics, measure
from galago.run import Run, load, write_json
from galago.schedule import Cosine, Schedule
from galago.spec import describe, packages
from galago.task import Task
from galago.trainer import Learner, OptimizerFactory, Plan, fit

MIXED = ("bf16-mixed", "16-mixed")


class Mixed(MixedPrecision):
    """Half precision in the layers that gain from it, while what goes into a step stays as it is.

    Lightning would round targets, too, so that 0.9 becomes 0.8984 and the shares of mixed images do not add up.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def train(
    model: nn.Module,
    task: Task,
    data: Data,
    run: Path,
    epochs: int = 10,
    methods: Sequence[Method] = (),
    optimizer: OptimizerFactory = lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    schedule: Schedule = Cosine(),  # noqa: B008 - has no state
    probes: Sequence[Probe] = (),
    watch: str = "accuracy",
    lower_is_better: bool = False,
    restore_best: bool = False,
    patience: int | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    channels_last: bool = False,
    compile: bool = False,
    average: float | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 20,
    tensorboard: bool = False,
    restart: bool = False,
    needs: Sequence[str] = (),
    recipe: dict[str, Any] | None = None,
) -> nn.Module:
    """Trains a network and writes it, with everything about how it came to be, into the run's folder.

    Started again with the same arguments, it goes on from its last checkpoint, or gives back what is finished.

    Args:
        model: from normalized images to raw output: any `nn.Module`.
        task: how an output is judged.
        data: where images come from.
        run: folder that everything is written to.
        epochs: passes over the training data.
        methods: published ideas to train with, in the order in which a batch meets them.
        optimizer: e.g. torch.optim.SGD, torch.optim.AdamW.
        schedule: factor on the learning rate over the training.
        probes: what is measured after each epoch and at the end, besides the task's own metrics.
        watch: which measured number decides about the best epoch.
        lower_is_better: whether what is watched is an error rather than a score.
        restore_best: ship the best epoch's weights rather than the last's.
        patience: stop after this many epochs without a better one; none: never.
        seed: of weights, order and augmentation.
        accelerator: cpu, cuda, mps or auto.
        devices: how many; more than one trains data-parallel, a process each.
        precision: 32-true or bf16-mixed.
        channels_last: lay images out channels innermost; faster on most processors.
        compile: compile the network with torch.compile; costs half a minute, worth it from some 200 steps on.
        average: decay of a moving average of the weights, which is then what is measured and shipped (0.999, say).
        accumulate: batches whose gradients are added up for each step.
        clip: largest norm of the gradient.
        checkpoint_every: steps between checkpoints within an epoch; one is written after each epoch anyway.
        log_every: steps between lines of log.jsonl.
        tensorboard: also log for TensorBoard (needs `pip install galago[tensorboard]`).
        restart: throw away what the run's folder holds and start over.
        needs: recipes (paths from this one's folder) whose runs this one uses; `galago ship` trains those missing.
        recipe: the resolved recipe as plain data; by default the arguments are described.

    Returns:
        The deployable model, in evaluation mode.

    Raises:
        UserError: anything a person can mend: names that do not exist, shapes that do not fit, a full disk.
    """
    files = Run(run)
    resolved = recipe if recipe is not None else _described(model, task, data, methods, probes, epochs)
    fabric = _fabric(accelerator, devices, precision, files if tensorboard else None, bool(methods))
    fabric.launch()
    torch.manual_seed(seed + fabric.global_rank)
    if fabric.is_global_zero:
        if restart:
            files.clear()
        files.begin(resolved, seed)
    fabric.barrier()
    if files.finished:
        say(f"{files.folder} is finished already; --restart true trains it again")
        return load(files.folder, allow=packages(resolved))
    model.__dict__.setdefault("built_from", resolved["model"])
    data.seed = seed
    model = model.to(fabric.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    check_fit(model, task, data)
    learner = Learner(model, task, methods, data.normalize, average, channels_last).to(fabric.device)
    plan = Plan(epochs, accumulate, clip, checkpoint_every, log_every, patience, lower_is_better, restore_best)
    everything = [TaskMetrics(), *probes]
    monitor = TrainingMonitor(learner, data, everything, watch, epochs, fabric.world_size)
    with monitor if fabric.is_global_zero else nullcontext():
        trained = fit(learner, data, optimizer, schedule, plan, fabric, files, monitor, compile)
    if fabric.is_global_zero:
        deployed = Deployed(trained, learner.normalize, task)
        with torch.compiler.set_stance("force_eager"):
            numbers = measure(everything, deployed, task, data)
        write_json(files.metrics, {"model": numbers})
        files.save_model(trained, data.normalize)
        say(f"{files.folder}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    fabric.barrier()
    return trained


def _fabric(accelerator: str, devices: int, precision: Any, logged: Run | None, ideas: bool) -> Fabric:
    # A method may leave parameters without a gradient in some steps; looking for them costs a little in each.
    strategy = DDPStrategy(find_unused_parameters=ideas) if devices > 1 else "auto"
    try:
        loggers: list[Logger] = []
        if logged is not None:
            loggers.append(TensorBoardLogger(logged.folder, name="tensorboard", version=""))
        how = {"plugins": Mixed(precision, _device(accelerator))} if precision in MIXED else {"precision": precision}
        return Fabric(accelerator=accelerator, devices=devices, strategy=strategy, loggers=loggers, **how)
    except ModuleNotFoundError as error:
        raise UserError(f"tensorboard: {error.name} is not installed; pip install 'galago[tensorboard]'") from error
    except (ValueError, RuntimeError) as error:
        raise UserError(f"accelerator, devices or precision: {str(error).splitlines()[0]}") from error


def _device(accelerator: str) -> str:
    """Where autocast is to work."""
    found = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def _described(
    model: nn.Module, task: Task, data: Data, methods: Sequence[Method], probes: Sequence[Probe], epochs: int
) -> dict[str, Any]:
    return {
        "model": describe(model),
        "task": describe(task),
        "data": describe(data),
        "methods": describe(list(methods)),
        "probes": describe(list(probes)),
        "epochs": epochs,
    }


def check_fit(model: nn.Module, task: Task, data: Data) -> None:
    """One example through model and task, so that what does not fit is said before training and in plain words."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = data.normalize.cpu()(data.example()).to(device)
    was_training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(example)
            decided = task.decode(output)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = "×".join(map(str, example.shape[1:]))
        reason = str(error).splitlines()[0]
        raise UserError(f"model: it cannot take the images of data ({shape}): {reason}") from error
    finally:
        model.train(was_training)
    if isinstance(decided, torch.Tensor) and decided.ndim == 2 and decided.shape[1] != len(data.classes):
        raise UserError(
            f"model: it tells {decided.shape[1]} classes apart, data has {len(data.classes)}"
            f" ({', '.join(data.classes[:5])}…); set the model's number of classes to {len(data.classes)}"
        )
