"""The laws of a Probe."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from galago.checkpoint import keep_random_state, random_state
from galago.data import Data
from galago.laws.trial import TinyImages, classify, clone, identical, require, tiny_network
from galago.probe import Deployed, Probe
from galago.task import Task


def check_probe(
    make_probe: Callable[[], Probe],
    make_model: Callable[[], nn.Module] = tiny_network,
    make_task: Callable[[], Task] = classify,
    make_data: Callable[[], Data] = TinyImages,
    repeatable: bool = True,
    same_on_artifact: bool = True,
) -> None:
    """Checks the laws of a Probe.

    It gives floats by name; it leaves weights, the mode of each module and the random state as they were; measured
    twice, the numbers are the same; and so they are on the model's exported file in ONNX Runtime.

    Args:
        make_probe: makes the probe.
        make_model: from normalized images of `make_data` to raw output.
        make_task: judges outputs.
        make_data: images to measure on.
        repeatable: False where numbers depend on the moment (latency).
        same_on_artifact: False where the number is about the file itself (its size, its speed).

    Raises:
        AssertionError: naming the law broken.
    """
    with keep_random_state():
        torch.manual_seed(0)
        probe, task, data = make_probe(), make_task(), make_data()
        deployed = Deployed(make_model(), data.normalize, task).train()
        next(iter(deployed.network.children()), deployed.network).eval()  # mixed modes, as frozen layers have
        numbers = _leaves_no_trace(probe, deployed, task, data)
        for name, value in numbers.items():
            real = isinstance(value, float) and not math.isnan(value)
            require(isinstance(name, str) and real, f"a probe gives floats by name, not {name!r}: {value!r}")
        again = probe(deployed, task, data)
        require(again.keys() == numbers.keys(), "a probe always gives the same names")
        require(not repeatable or again == numbers, f"a probe repeats itself, but {numbers} became {again}")
        if same_on_artifact:
            _agrees_on_artifact(probe, deployed.eval(), task, data)


def _leaves_no_trace(probe: Probe, deployed: Deployed, task: Task, data: Data) -> dict[str, float]:
    weights, modes = clone(deployed.state_dict()), {n: m.training for n, m in deployed.named_modules()}
    gradients = {name: clone(parameter.grad) for name, parameter in deployed.named_parameters()}
    random = random_state()
    numbers = probe(deployed, task, data)
    require(identical(random, random_state()), "a probe leaves the random state as it was")
    require(identical(weights, deployed.state_dict()), "a probe leaves weights and buffers as they were")
    changed = [name for name, module in deployed.named_modules() if module.training != modes[name]]
    require(not changed, f"a probe leaves each module in its mode, but these changed: {changed[:5]}")
    after = {name: parameter.grad for name, parameter in deployed.named_parameters()}
    require(identical(gradients, after), "a probe leaves no gradients behind")
    return numbers


def _agrees_on_artifact(probe: Probe, deployed: Deployed, task: Task, data: Data) -> None:
    from galago.deploy.integer import lower
    from galago.deploy.onnx import export
    from galago.deploy.runtime import OnnxRuntime

    image = data.example()
    network = lower(deployed.network, deployed.normalize(image))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(Deployed(network, deployed.normalize, task).eval(), image, path)
        on_file, on_model = probe(OnnxRuntime(path), task, data), probe(deployed, task, data)
    apart = {
        name: (value, on_file.get(name))
        for name, value in on_model.items()
        if name not in on_file or abs(value - on_file[name]) > 1e-3 * max(1.0, abs(value))
    }
    require(not apart, f"a probe gives the same on a model and on its exported file, but {apart} (model, file)")
