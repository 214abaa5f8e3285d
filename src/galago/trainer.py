"""The training loop, all of it: `Learner` is everything that learns, `fit` trains it.

`fit` writes checkpoints and continues from one where it exists, bit for bit as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from galago.batch import Batch, Step
from galago.checkpoint import Position, keep_random_state, restore, save
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.run import Run
from galago.schedule import Schedule
from galago.task import Task

OptimizerFactory = Callable[[ParamsT], Optimizer]


@dataclass(frozen=True)
class Plan:
    """How long and how to train.

    Args:
        epochs: passes over the training data.
        accumulate: batches whose gradients are added up before each optimizer step.
        clip: largest norm of the gradient; None leaves it as it is.
        checkpoint_every: optimizer steps between checkpoints within an epoch; None writes one each epoch only.
        log_every: optimizer steps between lines of the log.
        patience: epochs without improvement of what is watched before training stops; None never stops early.
        lower_is_better: whether what is watched is an error.
        restore_best: ship the best epoch's weights rather than the last's.
    """

    epochs: int
    accumulate: int = 1
    clip: float | None = None
    checkpoint_every: int | None = None
    log_every: int = 20
    patience: int | None = None
    lower_is_better: bool = False
    restore_best: bool = False


class Monitor(Protocol):
    """Watches a training: measures the model at the end of each epoch and shows how far it is."""

    def prepared(self, methods: Sequence[Method]) -> None:
        """Before the first batch, when every method has changed the network as it wants."""

    def stepped(self, epoch: int, batch: int, of: int, numbers: dict[str, float]) -> None:
        """After a batch; `numbers` are empty but for the steps that are logged."""

    def measured(self, epoch: int) -> tuple[dict[str, float], float]:
        """Everything measured, and the one number that is watched."""


class Learner(nn.Module):
    """Everything that learns, as one module: what Fabric wraps and what a checkpoint holds.

    Args:
        model: from normalized input to raw output.
        task: judges outputs.
        methods: in the order in which a batch meets them.
        normalize: from raw images to the model's input.
        average: decay of the exponential moving average of the weights that is measured and shipped; None for none.
        channels_last: lay images out with channels innermost, as CPU and tensor-core kernels like it.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        methods: Sequence[Method],
        normalize: nn.Module,
        average: float | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.task, self.methods = model, task, nn.ModuleList(methods)
        self.normalize, self.decay = normalize, average
        self.average: AveragedModel | None = None
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, batch: Batch, progress: float = 0.0) -> Step:
        image = self.normalize(batch.input)
        if image.ndim == 4:
            image = image.contiguous(memory_format=self.layout)
        return Forward(self.model, self.task.at(progress), self.ideas, progress)(batch._replace(input=image))

    @property
    def ideas(self) -> tuple[Method, ...]:
        """The methods, typed."""
        return tuple(method for method in self.methods if isinstance(method, Method))

    @property
    def measured(self) -> nn.Module:
        """The network that would be shipped now: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def follow_average(self) -> None:
        """Begins averaging anew wherever the network's structure has changed."""
        if self.decay is None:
            return
        names = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        if self.average is None or names != {n: t.shape for n, t in self.average.module.state_dict().items()}:
            moving = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
            average = AveragedModel(self.model, multi_avg_fn=moving, use_buffers=True)
            self.average = average.requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains, grouped by the learning-rate factor and weight decay that each module asks for its own."""
        groups: dict[tuple[float, float | None], list[nn.Parameter]] = {}
        seen: set[int] = set()
        for module in self.modules():
            asked: Callable[[], tuple[float, float | None]] | None = getattr(module, "own_rates", None)
            factor, decay = (1.0, None) if asked is None else asked()
            fresh = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
            seen.update(map(id, fresh))
            if fresh:
                groups.setdefault((factor, decay), []).extend(fresh)
        return [_group(parameters, *rates) for rates, parameters in groups.items()]


def _group(parameters: list[nn.Parameter], factor: float, decay: float | None) -> dict[str, Any]:
    return {"params": parameters, "factor": factor} | ({} if decay is None else {"weight_decay": decay})


def fit(
    learner: Learner,
    data: Data,
    factory: OptimizerFactory,
    schedule: Schedule,
    plan: Plan,
    fabric: Fabric,
    run: Run,
    monitor: Monitor,
    compile_model: bool = False,
) -> nn.Module:
    """Trains and returns the deployable model. Continues from the run's last checkpoint where there is one."""
    saved = run.load_checkpoint(run.last)
    prepare(learner, data, saved)
    monitor.prepared(learner.ideas)
    if compile_model:
        torch.compiler.reset()  # or code for an earlier network of this class would run, without the hooks of this one
        learner.model.compile()
    optimizer = new_optimizer(learner, factory)
    position = Position() if saved is None else restore(learner, optimizer, saved, fabric)
    run.rewind(position.step)
    for epoch in range(position.epoch, plan.epochs):
        if plan.patience is not None and position.stale > plan.patience:
            break
        if position.batch == 0:
            for method in learner.ideas:
                learner.model = method.epoch(learner.model, epoch)
        learner.follow_average()
        followed = follow(learner, optimizer, factory)
        if followed is not optimizer:  # a network of another structure: what was best before is no measure for it
            optimizer, position = followed, position._replace(best=None, stale=0)
        position = train_epoch(learner, data, optimizer, schedule, position, plan, fabric, run, monitor)
        position = end_epoch(learner, optimizer, position, plan, fabric, run, monitor)
    if plan.restore_best and (best := run.load_checkpoint(run.best)) is not None:
        learner.load_state_dict(best["learner"])
    return finish(learner)


def prepare(learner: Learner, data: Data, saved: dict[str, Any] | None) -> None:
    """Lets each method change the structure; on resume each has its buffers back before it does."""
    if saved is not None:
        learner.methods.load_state_dict(saved["methods"], strict=False)
    for method in learner.ideas:
        learner.model = method.prepare(learner.model, data)
    learner.follow_average()


def finish(learner: Learner) -> nn.Module:
    """The deployable model: what was averaged, without the methods' scaffolding."""
    model = learner.measured
    for method in reversed(learner.ideas):
        model = method.finish(model)
    return model.eval()


def train_epoch(
    learner: Learner,
    data: Data,
    optimizer: Optimizer,
    schedule: Schedule,
    position: Position,
    plan: Plan,
    fabric: Fabric,
    run: Run,
    monitor: Monitor,
) -> Position:
    """One pass over the training data, or what is left of it."""
    forward, stepper = fabric.setup(learner, optimizer)
    apply: Callable[[], None] = stepper.step
    for method in reversed(learner.ideas):
        apply = partial(method.update, learner.model, apply)
    batches = data.train(position.epoch, position.batch)
    total = position.batch + len(batches)
    heard: list[dict[str, Tensor]] = []
    learner.train()
    for batch in batches:
        progress = (position.epoch + position.batch / total) / plan.epochs
        if position.batch % plan.accumulate == 0:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * schedule(progress)
        position = position._replace(batch=position.batch + 1)
        steps_now = position.batch % plan.accumulate == 0 or position.batch == total
        with fabric.no_backward_sync(forward, enabled=not steps_now):
            step = forward(fabric.to_device(batch), progress)
            fabric.backward(step.loss / plan.accumulate)
        heard.append({name: loss.detach() for name, loss in step.losses.items()})
        if steps_now:
            if plan.clip is not None:
                fabric.clip_gradients(forward, stepper, max_norm=plan.clip)
            apply()
            stepper.zero_grad()
            if learner.average is not None:
                learner.average.update_parameters(learner.model)
            position = position._replace(step=position.step + 1)
        numbers: dict[str, float] = {}
        if steps_now and (position.step % plan.log_every == 0 or position.batch == total):
            numbers = _heard(heard, optimizer)
            _log_step(run, fabric, position, numbers)
        monitor.stepped(position.epoch, position.batch, total, numbers)
        due = plan.checkpoint_every and position.step % plan.checkpoint_every == 0
        if steps_now and due and position.batch < total:
            save(learner, optimizer, position, fabric, run)
            heard.clear()  # as a run that continues from here has heard nothing yet
    return position


def _heard(heard: list[dict[str, Tensor]], optimizer: Optimizer) -> dict[str, float]:
    """Mean losses since the last line, which are then forgotten."""
    means = {
        name: float(torch.stack([losses[name] for losses in heard if name in losses]).mean()) for name in heard[-1]
    }
    heard.clear()
    return {"loss": sum(means.values()), **means, "learning_rate": optimizer.param_groups[0]["lr"]}


def _log_step(run: Run, fabric: Fabric, position: Position, numbers: dict[str, float]) -> None:
    if not np.isfinite(numbers["loss"]):
        raise UserError(
            f"the loss is {numbers['loss']} in epoch {position.epoch + 1}, step {position.step}"
            f" ({', '.join(f'{k} {v:.3g}' for k, v in numbers.items())}); lower optimizer.init_args.lr or set clip,"
            " and where it is compiled try compile: false"
        )
    if fabric.is_global_zero:
        run.append({"kind": "step", "epoch": position.epoch, "step": position.step, **numbers})
    fabric.log_dict({f"train/{name}": value for name, value in numbers.items()}, step=position.step)


def end_epoch(
    learner: Learner, optimizer: Optimizer, position: Position, plan: Plan, fabric: Fabric, run: Run, monitor: Monitor
) -> Position:
    """Measures, remembers the best, writes checkpoints, and points at the next epoch."""
    with keep_random_state():
        numbers, watched = fabric.broadcast(monitor.measured(position.epoch) if fabric.is_global_zero else ({}, 0.0))
    better = position.best is None or (watched < position.best if plan.lower_is_better else watched > position.best)
    if fabric.is_global_zero:
        run.append({"kind": "epoch", "epoch": position.epoch, "step": position.step, **numbers})
    fabric.log_dict({f"validation/{name}": value for name, value in numbers.items()}, step=position.step)
    stale = 0 if better else position.stale + 1
    best = watched if better else position.best
    position = Position(position.epoch + 1, 0, position.step, best, stale)
    save(learner, optimizer, position, fabric, run, best=better)
    return position


def new_optimizer(learner: Learner, factory: OptimizerFactory) -> Optimizer:
    """The recipe's optimizer over the learner's groups; each group remembers its rate at full schedule."""
    optimizer = factory(learner.parameter_groups())
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"] * group["factor"]
    return optimizer


def follow(learner: Learner, optimizer: Optimizer, factory: OptimizerFactory) -> Optimizer:
    """The same optimizer, or a new one that keeps what it knew of the surviving parameters."""
    wanted = {id(p) for group in learner.parameter_groups() for p in group["params"]}
    if wanted == {id(p) for group in optimizer.param_groups for p in group["params"]}:
        return optimizer
    fresh = new_optimizer(learner, factory)
    fresh.state.update({p: state for p, state in optimizer.state.items() if id(p) in wanted})
    return fresh
