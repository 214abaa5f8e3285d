"""The laws of a Method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import yaml
from torch import Tensor, nn

from galago.batch import Batch
from galago.checkpoint import keep_random_state
from galago.data import Data
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, close, exported, identical, require, tiny_network
from galago.method import Forward, Method
from galago.spec import build, describe
from galago.task import Task
from galago.trainer import finish


def check_method(
    make_method: Callable[[], Method],
    make_model: Callable[[], nn.Module] = tiny_network,
    make_task: Callable[[], Task] = classify,
    make_data: Callable[[], Data] = TinyImages,
    same_answer: bool = True,
) -> None:
    """Checks the laws of a Method.

    It leaves the given batch and the model's hooks alone; it trains with finite losses; what it owns gets a gradient or
    is frozen; saved and resumed within an epoch, it goes on bit for bit; after `finish` the model answers as before and
    `torch.export` takes it; its description, written as YAML and read back, builds an equal method. If it has a number
    `weight`, then training at weight 0 is bit for bit training without it; random numbers that it draws do not count,
    so `make_model` should draw none itself (no dropout) for this law to say anything.

    Args:
        make_method: makes the method, with everything it needs.
        make_model: from normalized images of `make_data` to raw output.
        make_task: judges outputs.
        make_data: at least three training batches.
        same_answer: False where `finish` means to change the answer (joint prediction, abstention).

    Raises:
        AssertionError: naming the law broken.
    """
    with keep_random_state():
        start = partial(Trial, make_model, make_task(), make_data(), lambda: [make_method()])
        _leaves_alone(start())
        _trains(start())
        goes_on(start)
        _finishes(start(), same_answer)
        _rests_at_weight_zero(make_method, partial(Trial, make_model, make_task(), make_data()))
        torch.manual_seed(0)
        _describes_itself(make_method())


def _leaves_alone(trial: Trial) -> None:
    learner, given = trial.learner.train(), trial.batches[0]
    batch = given._replace(input=trial.data.normalize(given.input))
    before, hooks = clone(tuple(batch)), _hooks(learner.model)
    Forward(learner.model, trial.learner.task, trial.learner.ideas)(batch)
    for name, old, new in zip(Batch._fields, before, batch, strict=True):
        require(identical(old, new), f"a method leaves the given batch alone, but `{name}` has changed")
    require(hooks == _hooks(learner.model), "a method removes its hooks from the model when its step is over")


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _trains(trial: Trial) -> None:
    method, reached = trial.learner.ideas[0], set()
    own = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    before = clone(own)
    for name, parameter in own.items():
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda _, name=name: reached.add(name)
        )
    for number in range(2):
        for name, loss in trial.step(number).losses.items():
            require(loss.ndim == 0, f"each loss is a scalar, but {name!r} has the shape {tuple(loss.shape)}")
            require(loss.isfinite(), f"losses are finite, but {name!r} is {loss.item()} in step {number + 1}")
    for name, tensor in trial.learner.state_dict().items():
        require(not isinstance(tensor, Tensor) or tensor.isfinite().all(), f"training stays finite, but {name} did not")
    idle = [name for name in own if name not in reached and identical(own[name].detach(), before[name])]
    require(not idle, f"every parameter a method owns gets a gradient or is frozen, but {', '.join(idle)} got none")


def goes_on(start: Callable[..., Trial]) -> None:
    """Saved after a step and resumed, training goes on bit for bit.

    Args:
        start: begins it; with `saved` from there.

    Raises:
        AssertionError: it does not.
    """
    straight = start()
    straight.step(0)
    saved = straight.save()
    for number in (1, 2):
        straight.step(number)
    resumed = start(saved=saved)
    for number in (1, 2):
        resumed.step(number)
    first, second = straight.learner.state_dict(), resumed.learner.state_dict()
    lost = [name for name in first if not identical(first[name], second[name])]
    require(not lost, f"saved and resumed training goes on bit for bit, but these differ: {', '.join(lost[:5])}")


def _finishes(trial: Trial, same_answer: bool) -> None:
    trial.step(0)
    model, image = trial.learner.model.eval(), trial.image()
    with torch.no_grad():
        before = clone(model(image))
        finished = finish(trial.learner)
        after = finished(image)
        require(not same_answer or close(before, after), "after `finish` the model answers as before")
        require(close(after, exported(finished, image)), "after `finish` the exported model answers as the model does")


def _rests_at_weight_zero(make_method: Callable[[], Method], start: Callable[..., Trial]) -> None:
    def resting() -> list[Method]:
        method = make_method()
        object.__setattr__(method, "weight", 0.0)
        return [method]

    if not isinstance(getattr(make_method(), "weight", None), int | float):
        return
    trained = []
    for trial in (start(resting), start(list)):
        for number in range(2):
            torch.manual_seed(number)
            trial.step(number)
        trained.append(trial.learner.model.state_dict())
    require(identical(*trained), "at weight 0 training is bit for bit training without the method")


def _describes_itself(method: Method) -> None:
    try:
        described = describe(method)
    except UserError as error:
        raise AssertionError(f"broken law: a method's recipe prints and parses back, but {error}") from error
    written = yaml.safe_load(yaml.safe_dump(described))
    rebuilt = build(written, allow=[type(method).__module__.partition(".")[0]])
    shapes = [{name: tensor.shape for name, tensor in m.named_parameters()} for m in (method, rebuilt)]
    same = type(rebuilt) is type(method) and describe(rebuilt) == described and shapes[0] == shapes[1]
    require(same, f"a method's recipe prints and parses back, but {written} builds another one")
