"""GPTQ: weights rounded one column after another, each making up for the errors of those before it.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323.

What a layer gives wrong after rounding is quadratic in the rounding errors of each row of its weight, with the second
moments of its inputs for a Hessian. So errors can cancel: once a column is rounded, the columns still to come move to
where they best make up for it.

    H = (2 / n) sum x x^T over inputs x;   H_jj = 1 and W_j = 0 where H_jj = 0;   H_jj += damping mean(diag H)
    U = upper Cholesky factor of H^-1
    for each column j:   q_j = Q(w_j),   e_j = (w_j - q_j) / U_jj,   W_k -= e_j U_jk for all k > j

When to use it: weights of 3 or 4 bits from a trained network and a few hundred images, without labels and without
gradients: no learning rate, nothing to tune. List it behind `Quantize`, whose weight quantizer sets the scales and must
keep them (`CalibratedWeight`, `LSQWeight`, `GroupWiseWeight`). It costs a pass through the layers before it and one
factorization a layer, a minute for ResNet-20 and 1,024 images.

Recipe: recipes/quantize/gptq_w4a8_resnet20_cifar10.yaml.

For vision, and where the paper is silent: a convolution's columns are its input channels and taps, so inputs are
unfolded, and every group of channels has a Hessian of its own (depth-wise layers too). Layers are done in the order of
execution, each on the inputs that the quantized layers before it give, rounded as the layer rounds them. A row that
rounding to the nearest serves better on these inputs is rounded to the nearest. Everything is solved in float64.
BatchNorm is in evaluation mode and keeps its statistics; biases stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from galago.console import watched
from galago.data import Data
from galago.errors import UserError
from galago.layers import must_match, removing
from galago.method import Method
from galago.probe import device_of, evaluating
from galago.quantize.calibration import first_inputs, undisturbed
from galago.quantize.columns import as_weight, rows_and_columns, unfolding
from galago.quantize.layer import QuantLayer
from galago.quantize.patterns import matches
from galago.quantize.quantizer import along
from galago.quantize.rounding import weight_quantized, weight_quantizer_of, write_codes

BLOCK = 128  # columns after which the rest of the weight follows
PART = 32  # images unfolded at a time


class Grids(NamedTuple):
    """Where each weight may go: `scale * (code - zero_point)`, tensors that broadcast to the weight's shape."""

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes."""
        return ((weight / self.scale).round() + self.zero_point).clamp(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return (codes - self.zero_point) * self.scale

    def columns(self, order: Tensor) -> Grids:
        """Those of columns in another order."""
        return self._replace(scale=self.scale.gather(-1, order), zero_point=self.zero_point.gather(-1, order))


def compensated_codes(
    weight: Tensor, hessian: Tensor, grids: Grids, damping: float = 0.01, ordered: bool = False
) -> Tensor:
    """GPTQ itself: a code for each weight, float64, of the weight's shape.

    Args:
        weight: rows and columns, with any dimensions before them (groups of channels), G×R×C.
        hessian: of one row of each group, up to a factor, G×C×C.
        grids: of the weight's shape.
        damping: what is added to the Hessian's diagonal, as a share of its mean.
        ordered: columns in falling order of the Hessian's diagonal, so that those that matter most come first.

    >>> weight, grids = torch.tensor([[0.4, 0.4]]), Grids(torch.ones(1, 2), torch.zeros(1, 2), -2, 1)
    >>> compensated_codes(weight, torch.tensor([[1.0, 0.9], [0.9, 1.0]]), grids)  # two inputs that are much alike
    tensor([[0., 1.]], dtype=torch.float64)
    """
    weight, hessian, grids = weight.double().clone(), hessian.double().clone(), _double(grids, weight)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    diagonal[dead] = 1.0
    weight.masked_fill_(dead.unsqueeze(-2), 0.0)
    order = diagonal.argsort(stable=True, dim=-1, descending=True) if ordered else None
    diagonal += damping * diagonal.mean(-1, keepdim=True)
    if order is None:
        return _swept(weight, _inverse_factor(hessian), grids)
    rows, columns = order.unsqueeze(-2).expand_as(weight), order.unsqueeze(-2).expand_as(hessian)
    permuted = hessian.gather(-1, columns).gather(-2, columns.transpose(-1, -2))
    codes = _swept(weight.gather(-1, rows), _inverse_factor(permuted), grids.columns(rows))
    return torch.empty_like(codes).scatter_(-1, rows, codes)


def _double(grids: Grids, weight: Tensor) -> Grids:
    scale, zero_point = (tensor.double().expand_as(weight) for tensor in (grids.scale, grids.zero_point))
    return Grids(scale, zero_point, grids.low, grids.high)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular, of `H^-1 = U^T U`."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed.any():
        raise UserError("GPTQ: the inputs' second moments cannot be inverted; raise damping or batches")
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def _swept(weight: Tensor, factor: Tensor, grids: Grids) -> Tensor:
    """Column after column, the rest of the weight following once in a block of columns. Changes `weight`."""
    codes, columns = torch.empty_like(weight), weight.shape[-1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty_like(weight[..., start:end])
        for j in range(start, end):
            one = grids._replace(scale=grids.scale[..., j], zero_point=grids.zero_point[..., j])
            codes[..., j] = one.codes(weight[..., j])
            error = (weight[..., j] - one.values(codes[..., j])) / factor[..., j, j, None]
            weight[..., j + 1 : end] -= error.unsqueeze(-1) * factor[..., j, None, j + 1 : end]
            errors[..., j - start] = error
        weight[..., end:] -= errors @ factor[..., start:end, end:]
    return codes


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """What each row of a weight costs that is off by `difference`: `d H d^T`, up to the Hessian's factor."""
    return ((difference.double() @ hessian.double()) * difference).sum(-1)


class _ReachedError(Exception):
    """The layer that is looked at has its input; what follows need not run."""


@torch.no_grad()
def inputs_of(model: nn.Module, layer: QuantLayer, images: Tensor) -> Iterator[Tensor]:
    """What a layer computes with for calibration images, a part of them at a time: its inputs, rounded.

    Args:
        model: in evaluation mode.
        layer: of the model, which runs once in a forward pass.
        images: normalized.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0] if layer.input_quantizer is None else layer.input_quantizer(args[0]))
        raise _ReachedError

    with removing([layer.register_forward_pre_hook(catch)]):
        for part in torch.split(images, PART):
            with suppress(_ReachedError):
                model(part)
            yield caught.pop()


@torch.no_grad()
def second_moments(model: nn.Module, layer: QuantLayer, images: Tensor) -> Tensor:
    """`(2 / n) sum x x^T` of a layer's unfolded inputs over n images, G×C×C, float64."""
    columns, total = unfolding(layer.layer), torch.zeros((), dtype=torch.float64, device=images.device)
    for x in inputs_of(model, layer, images):
        taken = columns(x)
        total = total + (taken @ taken.transpose(-1, -2)).double()
    return total * (2 / len(images))


@torch.no_grad()
def in_order(model: nn.Module, layers: dict[str, QuantLayer], image: Tensor) -> list[str]:
    """Paths of the layers, in the order of execution."""
    seen: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, path=path: seen.append(path))
        for path, layer in layers.items()
    ]
    with removing(handles):
        model(image)
    return seen


class Repaired(NamedTuple):
    """What became of one layer: the error of its output, squared and summed, on the calibration images."""

    path: str
    nearest: float
    found: float


class GPTQ(Method):
    """Chooses the integers of quantized weights, before training or without any; list it behind `Quantize`.

    Args:
        batches: of training images that the layers' inputs are taken from.
        damping: added to the Hessian's diagonal, as a share of its mean.
        ordered: round first the columns whose inputs are largest (the paper's code: `act-order`).
        keep: patterns of module paths or type names; weights of everything inside are rounded to the nearest.
    """

    done: Tensor

    def __init__(
        self, batches: int = 8, damping: float = 0.01, ordered: bool = False, keep: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if batches < 1:
            raise UserError(f"GPTQ: batches is {batches}, which leaves no images to look at; give 1 or more")
        if damping < 0:
            raise UserError(f"GPTQ: damping is {damping:g}; give a share of 0 or more, usually 0.01")
        self.batches, self.damping, self.ordered, self.keep = batches, damping, ordered, tuple(keep)
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self._rows: list[Repaired] = []

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Writes other integers into the weights; on resume they come from the checkpoint."""
        layers = self.meant(model)
        if not self.done:
            images = first_inputs(data, self.batches, device_of(model))
            with evaluating(model), undisturbed([model]), torch.no_grad():
                for path in watched(in_order(model, layers, images[:1]), "GPTQ"):
                    self._rows.append(self.repair(model, path, layers[path], images))
            self.done.fill_(True)
        return model

    def meant(self, model: nn.Module) -> dict[str, QuantLayer]:
        """The layers whose weight is quantized, without those that `keep` names."""
        layers, modules = weight_quantized(model), dict(model.named_modules())
        for pattern in self.keep:
            must_match(pattern, modules)
        return {
            path: layer
            for path, layer in layers.items()
            if not any(matches(pattern, f"{path}.layer".removeprefix("."), modules) for pattern in self.keep)
        }

    def repair(self, model: nn.Module, path: str, layer: QuantLayer, images: Tensor) -> Repaired:
        """Chooses one layer's integers."""
        weight, quantizer = layer.layer.get_parameter("weight").detach(), weight_quantizer_of(layer)
        hessian, grid = second_moments(model, layer, images), quantizer.grid()
        spread = (along(tensor, weight, grid.axis).expand_as(weight) for tensor in (grid.scale, grid.zero_point))
        scale, zero_point = (rows_and_columns(layer.layer, tensor).double() for tensor in spread)
        grids = Grids(scale, zero_point, grid.low, grid.high)
        rows = rows_and_columns(layer.layer, weight).double()
        nearest = rows_and_columns(layer.layer, quantizer.codes(weight)).double()
        codes = compensated_codes(rows, hessian, grids, self.damping, self.ordered)
        before, after = (output_error(grids.values(found) - rows, hessian) for found in (nearest, codes))
        codes = torch.where((after < before).unsqueeze(-1), codes, nearest)
        write_codes(path, layer, as_weight(layer.layer, codes, weight.shape))
        return Repaired(path, float(before.sum()), float(torch.minimum(before, after).sum()))

    def summary(self) -> Table | None:
        """How far off each layer's output is, rounded to the nearest and as chosen."""
        if not self._rows:
            return None
        table = Table("layer", "squared error, nearest", "GPTQ", "share", title="GPTQ")
        for path, nearest, found in self._rows:
            table.add_row(path, f"{nearest:.4g}", f"{found:.4g}", f"{found / nearest:.2f}" if nearest else "")
        return table
