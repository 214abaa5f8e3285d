"""Temperature and vector scaling: a trained network made as sure as it should be, at no cost in use.

Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Weinberger, "On Calibration of Modern Neural Networks", ICML 2017,
arXiv:1706.04599.

When training is over, one number T (or two for each class, a and c) is fitted on the validation images, so that their
labels become likeliest, and taken into the weight and bias of the last linear layer, which is the network's answer:

    temperature   softmax(z / T)          W ← W / T,  b ← b / T
    vector        softmax(a z + c)        W_k ← a_k W_k,  b_k ← a_k b_k + c_k

When: a probability is shown to somebody, or a threshold set on it; after every training, and anew after every pruning
and quantization. T leaves all decisions as they are. Vector scaling may change some, and wants a few hundred images of
each class. Neither costs anything in use. `galago.probes.temperature` measures what T would give without changing a
network. Set images aside for it (`hold_out`): on images that were trained on, a network seems surer than it is.

It needs no training: `epochs: 0` behind a network that `galago.run.load` gives. Beside `Quantize`, before or behind it,
the weight's step is scaled like the weight, so that no integer changes.

Usual setting: T, by likelihood. Recipe: recipes/regularize/temperature_resnet20_cifar10.yaml.

Chosen here: where the answer is no linear layer's (an ensemble's mean), where that has no bias to take c, or its
quantizer cannot be scaled, the scores are scaled behind the network, K products an image; a line says so. a and c are
drawn towards temperature scaling by 1e-4 (mean ln(T a)² + mean c²), so that they exist where every validation image is
right, and for a class without any; a is positive, so that no score argues against its class.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from galago.console import say
from galago.data import Data
from galago.errors import UserError
from galago.layers import Wrapper, classifier, find, tap
from galago.method import Method
from galago.probe import collect, device_of, evaluating, normalized
from galago.quantize.layer import QuantLayer
from galago.task import scores_of
from galago.temperature import fit_temperature

STEPS = 200  # of L-BFGS at most
DRAWN = 1e-4


def fit_vector(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `c`, K numbers each, float64, for which `softmax(a z + c)` makes the targets likeliest.

    Args:
        output: z, class scores N×K, of images that were not trained on.
        target: class probabilities N×K.

    >>> scores = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).repeat(4, 1)
    >>> target = torch.tensor([[1.0, 0.0], [0.2, 0.8]]).repeat(4, 1)
    >>> a, c = fit_vector(scores, target)
    >>> (a * scores[1] + c).softmax(0)
    tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    temperature, z, q = fit_temperature(output, target), output.double(), target.double()
    power = torch.zeros(z.shape[1], dtype=z.dtype, device=z.device, requires_grad=True)  # ln(T a)
    shift = torch.zeros_like(power, requires_grad=True)
    optimizer = torch.optim.LBFGS([power, shift], max_iter=STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        drawn = power.square().mean() + shift.square().mean()
        value = cross_entropy(power.exp() / temperature * z + shift, q) + DRAWN * drawn
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return power.detach().exp() / temperature, shift.detach()


class Rescaled(Wrapper):
    """A network whose scores are scaled and shifted, class by class.

    Args:
        layer: the network.
        classes: K.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, layer: nn.Module, classes: int) -> None:
        super().__init__(layer)
        self.classes = classes
        self.register_buffer("scale", torch.ones(classes))
        self.register_buffer("shift", torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        return scores_of(self.layer(x)) * self.scale + self.shift


class Rescaling(Method):
    """Fits a scale and a shift of each class's score when training is over, and takes them into the network."""

    def __init__(self) -> None:
        super().__init__()
        self._data: Data | None = None

    @abstractmethod
    def fit(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, K numbers each, of validation scores and targets N×K."""

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Looks at the answer to one image.

        Raises:
            UserError: it does not have a score for each class.
        """
        self._data = data
        with evaluating(model), torch.no_grad():
            scores = scores_of(model(normalized(data, data.example(), device_of(model))))
        if scores.ndim != 2 or scores.shape[1] != len(data.classes):
            given = "×".join(map(str, scores.shape[1:]))
            raise UserError(
                f"{type(self).__name__}: the network gives {given} scores for {len(data.classes)} classes;"
                " leave it out for this task"
            )
        return model

    @torch.no_grad()
    def finish(self, model: nn.Module) -> nn.Module:
        """Fits, and folds the result into the last layer."""
        assert self._data is not None, "prepare comes first"
        with torch.compiler.set_stance("force_eager"):
            seen = collect(nn.Sequential(self._data.normalize, model), self._data.validation())
            output, target = seen.output.double(), seen.target.double()
            scale, shift = self.fit(output, target)
            before, after = (cross_entropy(z, target) for z in (output, output * scale + shift))
            place = answering(model, normalized(self._data, self._data.example(), device_of(model)))
            scale, shift = scale.to(device_of(model)), shift.to(device_of(model))
        folded = place is not None and fold(find(model, place), scale, shift)
        say(
            f"{type(self).__name__}: {said(scale)} from {len(target)} validation images, NLL {before:.4f} →"
            f" {after:.4f}; {f'folded into {place}' if folded else 'applied behind the network'}"
        )
        return model if folded else rescaled(model, scale, shift)


class TemperatureScaling(Rescaling):
    """Divides the scores by one temperature, fitted on the validation images when training is over."""

    def fit(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.full([output.shape[1]], 1 / fit_temperature(output, target), dtype=torch.float64)
        return scale, torch.zeros_like(scale)


class VectorScaling(Rescaling):
    """Scales and shifts each class's score, as fitted on the validation images when training is over."""

    def fit(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return fit_vector(output, target)


def said(scale: Tensor) -> str:
    """A scale in words."""
    low, high = (float(1 / one) for one in (scale.max(), scale.min()))
    return f"T = {low:.3g}" if low == high else f"T from {low:.3g} to {high:.3g}"


def rescaled(model: nn.Module, scale: Tensor, shift: Tensor) -> Rescaled:
    """A network whose scores are scaled behind it."""
    wrapped = Rescaled(model, len(scale)).to(scale.device)
    wrapped.scale.copy_(scale)
    wrapped.shift.copy_(shift)
    return wrapped


@torch.no_grad()
def answering(model: nn.Module, image: Tensor) -> str | None:
    """The path of the linear layer, quantized or not, whose result is the network's answer; None if there is none."""
    try:
        path = classifier(model)
    except UserError:
        return None
    while isinstance(part := find(model, path), Wrapper) and not isinstance(part, QuantLayer):
        path = f"{path}.layer" if path else "layer"
    with evaluating(model), tap(model, path) as last:
        answer = scores_of(model(image))
    given = last.value
    return path if isinstance(given, Tensor) and given.shape == answer.shape and torch.equal(given, answer) else None


@torch.no_grad()
def fold(layer: nn.Module, scale: Tensor, shift: Tensor) -> bool:
    """Takes a scale and a shift into a linear layer's weight and bias; False, with nothing changed, if it cannot.

    Args:
        layer: linear, or a `QuantLayer` of one.
        scale: K numbers, float64.
        shift: K numbers.
    """
    linear = layer.layer if isinstance(layer, QuantLayer) else layer
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if not isinstance(linear, nn.Linear) or weight is None or (bias is None and bool(shift.any())):
        return False
    if isinstance(layer, QuantLayer) and layer.output_scale is not None:
        if not (scale == scale[0]).all():
            return False
        layer.output_scale.copy_(layer.output_scale.double() * scale[0])
        scale, shift = torch.ones_like(scale), shift / layer.output_scale.abs().double().clamp_min(1e-12)
    elif not (isinstance(layer, QuantLayer) and layer.weight_quantizer is not None):
        weight.copy_(weight.double() * scale[:, None])
    elif not scale_codes(layer, scale):
        return False
    if bias is not None:
        bias.copy_(bias.double() * scale + shift)
    return True


def scale_codes(layer: QuantLayer, scale: Tensor) -> bool:
    """Scales what the integers of a quantized weight stand for; False, with nothing changed, if it cannot.

    The range of a quantizer either follows the weight or is one of its numbers, which are scaled then; both are tried.
    """
    quantizer, weight = layer.weight_quantizer, layer.layer.get_parameter("weight")
    assert quantizer is not None
    codes = quantizer.codes(weight).clone()
    wanted = quantizer.grid().values(codes).double() * scale[:, None]
    ranges = [one for one in (*quantizer.parameters(), *quantizer.buffers()) if one.is_floating_point()]
    before = [(one, one.clone()) for one in (weight, *ranges)]
    factor = scale[0] if (scale == scale[0]).all() else scale
    for scaled in ([], [one for one in ranges if factor.ndim == 0 or one.shape == factor.shape]):
        for one, held in before:
            one.copy_(held)
        weight.copy_(wanted)
        for one in scaled:
            one.copy_(one.double() * factor)
        same = torch.equal(quantizer.codes(weight), codes)
        if same and torch.allclose(quantizer.grid().values(codes).double(), wanted, rtol=1e-5, atol=0):
            return True
    for one, held in before:
        one.copy_(held)
    return False
