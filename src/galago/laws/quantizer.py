"""The laws of a Quantizer."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from galago.checkpoint import keep_random_state
from galago.laws.integers import Real, accumulator_step, across_channels, quantized_layer
from galago.laws.trial import classify, identical, require
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.quantize.quantizer import Grid, Quantizer, along
from galago.spec import build, describe

Maker = Callable[[], Quantizer]


def check_quantizer(
    make_quantizer: Maker, for_weights: bool = False, idempotent: bool = False, deployable: bool = True
) -> None:
    """Checks the laws of a Quantizer.

    At most 2^bits values a slice; in evaluation mode `forward(x)` is exactly `grid().values(codes(x))`, with whole
    codes between `low` and `high` in multiples of `step`; a finite gradient; copied, or written down and rebuilt with
    its state, it rounds alike; bfloat16 moves a code by at most one; in a `QuantLayer` it serves convolutions of odd
    widths, with stride, groups and depth-wise, and linear layers; int64 arithmetic on the codes gives what the layer
    gives, and so does ONNX Runtime with the exported file.

    Args:
        make_quantizer: makes the quantizer, not initialized.
        for_weights: whether it is tried on weights, or on what comes in (never negative, as after a ReLU).
        idempotent: whether rounding twice is claimed to be rounding once.
        deployable: False where no engine computes with its grid (more than 8 bits, a scale per input channel).

    Raises:
        AssertionError: naming the law broken.
    """
    with keep_random_state():
        torch.manual_seed(0)
        x = torch.randn(7, 5, 3, 3) * 0.1 if for_weights else torch.randn(4, 5, 9, 9).relu()
        quantizer = make_quantizer()
        quantizer.initialize(x)
        _gives_finite_gradients(quantizer, torch.cat([x, torch.zeros_like(x), 100 * x, -x]) if not for_weights else x)
        quantizer.eval()
        _lies_on_its_grid(quantizer, x)
        require(not idempotent or identical(quantizer(x), quantizer(quantizer(x))), "rounding twice is rounding once")
        _survives_copying(quantizer, x, for_weights)
        _bears_half_precision(quantizer, x)
        _serves_layers(make_quantizer, for_weights, deployable)
        if deployable:
            _runs_in_an_engine(make_quantizer, for_weights)


def _gives_finite_gradients(quantizer: Quantizer, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    output = quantizer.train()(x)
    require(output.shape == x.shape and output.dtype == x.dtype, "rounding keeps shape and dtype")
    (output * torch.randn_like(output)).sum().backward()
    require(x.grad is not None and x.grad.isfinite().all(), "the gradient of what is rounded is finite")
    for name, parameter in quantizer.named_parameters():
        reached = parameter.grad is not None or not parameter.requires_grad
        require(reached, f"every parameter of a quantizer gets a gradient or is frozen, but {name} got none")
        require(parameter.grad is None or parameter.grad.isfinite().all(), f"the gradient of {name} is finite")


@torch.no_grad()
def _lies_on_its_grid(quantizer: Quantizer, x: Tensor) -> None:
    output, codes, grid = quantizer(x), quantizer.codes(x), quantizer.grid()
    require(codes.shape == x.shape and identical(codes, codes.round()), "codes are whole numbers, one a value")
    inside = codes.min() >= grid.low and codes.max() <= grid.high
    require(inside, f"codes lie from {grid.low} to {grid.high}, not from {codes.min():g} to {codes.max():g}")
    require(((codes - grid.low) % grid.step == 0).all(), f"codes come in steps of {grid.step} from {grid.low}")
    levels = (grid.high - grid.low) // grid.step + 1
    require(levels <= 2**quantizer.bits, f"a grid of {quantizer.bits} bits has at most 2^bits codes, not {levels}")
    require((grid.scale > 0).all(), "a grid's scale is positive")
    on_grid = torch.equal(output, grid.values(codes))
    require(on_grid, "in evaluation mode `forward(x)` is exactly `grid().values(codes(x))`")
    for part in output.unbind(grid.axis) if grid.axis is not None else [output]:
        found = len(part.unique())
        require(found <= 2**quantizer.bits, f"at most 2^bits values are left in a slice, not {found}")


@torch.no_grad()
def _survives_copying(quantizer: Quantizer, x: Tensor, for_weights: bool) -> None:
    expected, twin = quantizer(x), copy.deepcopy(quantizer)
    require(identical(expected, twin(x)), "a deep copy rounds alike")
    own = {tensor.data_ptr() for tensor in quantizer.state_dict().values() if isinstance(tensor, Tensor)}
    shared = own & {tensor.data_ptr() for tensor in twin.state_dict().values() if isinstance(tensor, Tensor)}
    require(not shared, "a deep copy shares no tensor with the original")
    fresh = build(describe(quantizer), allow=[type(quantizer).__module__.partition(".")[0]])
    if for_weights:  # as a layer does that is rebuilt before its weights are loaded
        fresh.initialize(torch.randn_like(x))
    try:
        fresh.load_state_dict(quantizer.state_dict())
    except RuntimeError as error:
        raise AssertionError(f"broken law: a rebuilt quantizer takes the state that was saved, but {error}") from error
    require(
        identical(expected, fresh.eval()(x)),
        "a quantizer that was written down and rebuilt with its state rounds alike",
    )


@torch.no_grad()
def _bears_half_precision(quantizer: Quantizer, x: Tensor) -> None:
    full, half, grid = quantizer(x), quantizer(x.bfloat16()), quantizer.grid()
    require(half.dtype == torch.bfloat16, "a bfloat16 tensor is rounded to a bfloat16 tensor")
    apart = (half.float() - full).abs() / along(grid.scale, x, grid.axis)
    require((apart.round() <= grid.step).all(), f"bfloat16 moves a code by at most one step, not {apart.max():.1f}")


class Plain(Quantizer):
    """The simplest quantizer that obeys the laws, for the other side of a layer: 8 bits, symmetric, nothing learned."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bits = 8
        self.register_buffer("scale", torch.ones(()))

    def initialize(self, x: Tensor) -> None:
        self.scale.copy_(x.abs().max() / 127)

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x / self.scale).round().clamp(-127, 127) * self.scale
        return x + (rounded - x).detach() if self.training else rounded

    def grid(self) -> Grid:
        return Grid(self.scale, torch.zeros(()), -127, 127)


class Place(NamedTuple):
    """A layer to quantize, and what of the one image below it reads."""

    layer: nn.Module
    view: Callable[[Tensor], Tensor]


def _image() -> Tensor:
    return torch.randn(2, 6, 9, 8).relu()


def _places(bias: bool) -> list[Place]:
    """Layers of every kind that a QuantLayer takes."""
    return [
        Place(nn.Conv2d(5, 7, 3, padding=1, bias=bias), lambda image: image[:, :5]),
        Place(nn.Conv2d(6, 7, 3, stride=2, padding=1, bias=bias), lambda image: image),
        Place(nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=bias), lambda image: image),
        Place(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias), lambda image: image),
        Place(nn.Linear(11, 7, bias=bias), lambda image: image.flatten(1)[:, :11]),
    ]


def _quantized(make_quantizer: Maker, for_weights: bool, layer: nn.Module, x: Tensor) -> QuantLayer:
    pair = (make_quantizer(), Plain()) if for_weights else (Plain(), make_quantizer())
    quant = QuantLayer(layer, *pair)
    quant.observing = True
    quant(x)
    return quant


def _serves_layers(make_quantizer: Maker, for_weights: bool, deployable: bool) -> None:
    image = _image()
    for layer, view in _places(bias=True):
        quant = _quantized(make_quantizer, for_weights, layer, x := view(image))
        quant.train()(x).square().sum().backward()
        for name, parameter in quant.named_parameters():
            finite = parameter.grad is not None and parameter.grad.isfinite().all()
            require(finite or not parameter.requires_grad, f"in {layer} the gradient of {name} is there and finite")
        with torch.no_grad():
            expected = quant.eval()(x)
        if deployable:
            worst = _apart(quantized_layer(quant, x), expected)
            require(worst <= 1e-5, f"int64 arithmetic on the codes gives {layer}'s output, but it is {worst:.1e} off")


def _apart(found: Real, expected: Tensor) -> float:
    wanted = expected.double().numpy()
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-12))


class _SideBySide(nn.Module):
    """Several layers that read the same image, as one network with one output."""

    def __init__(self, layers: Sequence[nn.Module], places: Sequence[Place]) -> None:
        super().__init__()
        self.layers, self.views = nn.ModuleList(layers), [place.view for place in places]

    def forward(self, image: Tensor) -> Tensor:
        pairs = zip(self.layers, self.views, strict=True)
        return torch.cat([layer(view(image)).flatten(1) for layer, view in pairs], 1)


def _runs_in_an_engine(make_quantizer: Maker, for_weights: bool) -> None:
    image, places = _image(), _places(bias=False)
    quants = [_quantized(make_quantizer, for_weights, place.layer, place.view(image)).eval() for place in places]
    answer, start = _in_onnx_runtime(_SideBySide(quants, places), image), 0
    for quant, place in zip(quants, places, strict=True):
        expected = quantized_layer(quant, place.view(image))
        found = answer[:, start : start + expected[0].size].reshape(expected.shape)
        start += expected[0].size
        steps = float(np.abs((found - expected) / across_channels(accumulator_step(quant), expected.ndim)).max())
        require(steps < 0.5, f"ONNX Runtime gives the same integers in {place.layer}, but it is {steps:.2g} steps off")


def _in_onnx_runtime(network: nn.Module, image: Tensor) -> Real:
    from galago.deploy.integer import lower
    from galago.deploy.onnx import export
    from galago.deploy.runtime import OnnxRuntime

    deployed = Deployed(lower(network, image), nn.Identity(), classify())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.onnx"
        export(deployed.eval(), image, path, float_image=True)
        output: Real = OnnxRuntime(path)(image).double().numpy()
    return output
