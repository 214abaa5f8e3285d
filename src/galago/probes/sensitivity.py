"""Sensitivity: what each layer's rounding costs, alone and as the only one left out.

For each quantized layer the network runs twice more: with this layer alone in quantized values (all others in float),
and with all but this one. Compared with the same network all in float:

    alone       is this layer hard to quantize at all?
    all but it  what would keeping it in float (or giving it more bits) win back?  all - all but it
    KL          mean Σ_k p_k log(p_k / q_k), p of the float network, q of the other, where outputs are probabilities
    MSE         mean (y_hat - y)² of the raw outputs
    signal to noise of the layer's own output, alone   10 log10(Σ y² / Σ (y_hat - y)²), in decibels

When to use it: a quantized network lost more than expected, and you want to know where, before you write `rules`. It
costs 2 (layers + 1) passes over `images` when a finished run is measured, seconds for ResNet-20: `galago measure` and
`ship` write sensitivity.json, which the report draws. While training, and among the numbers of the finished network,
only the whole is told, which takes two passes.

Design choices: all quantized streams together count as one more layer, `streams`: they all have the same width, and
what is to be decided about them is whether to have them. Images are validation images, because what this tells is acted
on; they are spread evenly over the set, which may be sorted by class. "Float" is the network with its trained weights,
its quantizers at rest: after long training at 2 bits, or with a learned output scale, that is no good network, and the
losses are distances from it all the same; its own metrics stand in the table. A file knows nothing of layers and gives
no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.console import watched
from galago.data import Data
from galago.errors import UserError
from galago.probe import Deployed, Outputs, Probe, TaskMetrics, collect, device_of, spread
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.task import Task

STREAMS = "streams"
Parts = list[QuantLayer | QuantOutput]


def decibels(signal: float, noise: float) -> float:
    """Signal to noise: ten for each power of ten, within ±300.

    >>> round(decibels(100.0, 1.0), 6), decibels(1.0, 0.0)
    (20.0, 300.0)
    """
    if not signal or not noise:
        return -300.0 if noise else 300.0
    return min(max(10 * math.log10(signal / noise), -300.0), 300.0)


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean `Σ_k p_k log(p_k / q_k)` of probabilities along dimension 1, in nats, computed in float64.

    >>> round(divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])), 4)
    0.1438
    """
    p, q = (each.double().clamp_min(torch.finfo(torch.float64).tiny) for each in (p, q))
    return float((p * (p.log() - q.log())).sum(1).mean())


def are_probabilities(decoded: Any) -> bool:
    """Whether what a user sees of an output is a distribution over classes along dimension 1."""
    if not isinstance(decoded, Tensor) or decoded.ndim < 2 or not decoded.is_floating_point():
        return False
    sums = decoded.double().sum(1)
    return bool((decoded >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


class Sensitivity(Probe):
    """`quantization_kl` and `quantization_db` (of the output) against the network in float; layer by layer: `table`.

    Args:
        images: how many validation images are looked at.
    """

    def __init__(self, images: int = 256) -> None:
        if images < 1:
            raise UserError(f"Sensitivity: images is {images}; give 1 or more")
        self.images = images

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        parts = _parts(deployed)
        if not parts:
            return {}
        comparison = _Comparison(deployed, task, spread(data.validation(), self.images))
        found = comparison.awake(parts)
        return {f"quantization_{name}": found[name] for name in ("kl", "db") if name in found}

    def table(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, Any]:
        """Plain data: what `float`, `all` and, for each of `layers`, `alone` and `all_but` come to.

        Args:
            deployed: a quantized network in PyTorch; left as it was.
            task: judges outputs.
            data: gives the validation images.

        Returns:
            Metrics of the task, `kl`, `mse` and `db` of the output for each; empty where nothing is quantized.
        """
        parts = _parts(deployed)
        if not parts:
            return {}
        comparison = _Comparison(deployed, task, spread(data.validation(), self.images))
        rows = []
        for path, own in watched(list(_entries(deployed).items()), "sensitivity of each layer"):
            others = [part for part in parts if part not in own]
            with _listening(own[0]) as heard:
                alone = comparison.awake(own)
            row = {"path": path} | _described(own[0]) | {"snr_db": heard.decibels(), "alone": alone}
            rows.append(row | {"all_but": comparison.awake(others)})
        images = len(comparison.reference.target)
        return {"images": images, "float": comparison.plain, "all": comparison.awake(parts), "layers": rows}


class _Comparison:
    """The network all in float on some images, and what others of its states differ from it.

    Args:
        deployed: whose quantized parts are put to rest.
        task: judges outputs.
        batches: of images.
    """

    def __init__(self, deployed: nn.Module, task: Task, batches: Sequence[Batch]) -> None:
        self.deployed, self.task, self.batches = deployed, task, batches
        with _awake(deployed, ()):
            self.reference = collect(deployed, batches)
        self.plain = self._compared(self.reference)

    def awake(self, parts: Parts) -> dict[str, float]:
        """Metrics and errors of the network when these parts alone compute in quantized values."""
        with _awake(self.deployed, parts):
            return self._compared(collect(self.deployed, self.batches))

    def _compared(self, found: Outputs) -> dict[str, float]:
        y, y_hat = self.reference.output.double(), found.output.double()
        noise = (y_hat - y).square()
        numbers = TaskMetrics().score(found, self.task)
        p, q = self._decoded(y), self._decoded(y_hat)
        if are_probabilities(p):
            numbers["kl"] = divergence(p, q)
        return numbers | {"mse": float(noise.mean()), "db": decibels(float(y.square().sum()), float(noise.sum()))}

    def _decoded(self, output: Tensor) -> Any:
        """What a user sees, and beside it what a task holds back that may abstain: together a distribution."""
        decoded, held = self.task.decode(output), self.task.reservation(output)
        return decoded if held is None else torch.cat([decoded, held[:, None]], 1)


def _parts(deployed: nn.Module) -> Parts:
    return [module for module in deployed.modules() if isinstance(module, QuantLayer | QuantOutput)]


def _entries(deployed: nn.Module) -> dict[str, Parts]:
    """What is looked at by itself: each layer under its path in the network, and all streams as one."""
    network = deployed.network if isinstance(deployed, Deployed) else deployed
    found: dict[str, Parts] = {p: [m] for p, m in network.named_modules() if isinstance(m, QuantLayer)}
    streams: Parts = [module for module in network.modules() if isinstance(module, QuantOutput)]
    return found | ({STREAMS: streams} if streams else {})


def _described(part: nn.Module) -> dict[str, Any]:
    """Type and bits of a layer; the streams have a width as inputs have."""
    if isinstance(part, QuantOutput):
        return {"type": "", "weight_bits": None, "input_bits": part.output_quantizer.bits}
    assert isinstance(part, QuantLayer)
    bits = (None if q is None else q.bits for q in (part.weight_quantizer, part.input_quantizer))
    return {"type": type(part.layer).__name__} | dict(zip(("weight_bits", "input_bits"), bits, strict=True))


@contextmanager
def _awake(deployed: nn.Module, parts: Collection[nn.Module]) -> Iterator[None]:
    """These parts compute in quantized values and all others in float, as long as the `with` lasts."""
    before = [(part, part.resting) for part in _parts(deployed)]
    try:
        for part, _ in before:
            part.resting = None if part in parts else torch.ones((), device=device_of(part))
        yield
    finally:
        for part, resting in before:
            part.resting = resting


class _Heard:
    """Signal and noise of a layer's own output."""

    def __init__(self) -> None:
        self.signal, self.noise = 0.0, 0.0

    def decibels(self) -> float | None:
        return decibels(self.signal, self.noise) if self.signal else None


@contextmanager
def _listening(part: nn.Module) -> Iterator[_Heard]:
    """Compares what a layer gives out with what it would in float on the same input; nothing for streams."""
    heard = _Heard()

    def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, QuantLayer)
        y = module.layer(*inputs).double()
        heard.signal += float(y.square().sum())
        heard.noise += float((output.double() - y).square().sum())

    handle = part.register_forward_hook(compare) if isinstance(part, QuantLayer) else None
    try:
        yield heard
    finally:
        if handle is not None:
            handle.remove()
