"""What became of every layer and operation when a network was quantized, as plain rows and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.table import Table
from torch import Tensor

from galago.layers import Call
from galago.quantize.graph import JOINS, MAXIMA, MEANS, MOVES, PRODUCTS, RECTIFIERS, Graph
from galago.quantize.placement import Missed, Streams
from galago.quantize.quantizer import Quantizer


class Row(NamedTuple):
    """One layer, stream or operation. Empty texts mean: nothing of the kind here."""

    path: str  # of the module
    kind: str  # type of the layer, or the operation in words
    shape: str  # of the weight, or of the tensor given out
    weight: str  # its quantizer, such as "LSQ 4"
    input: str
    stream: str  # the quantizer of what it gives out
    note: str  # why something stays float, or what is lost

    @property
    def stays_float(self) -> bool:
        """Whether an engine computes this in float."""
        return self.note.startswith("float")


# What operations are called in words; others keep PyTorch's name.
WORDS = {
    "native_layer_norm": "layer normalization",
    "native_group_norm": "group normalization",
    "_fused_rms_norm": "root-mean-square normalization",
    "_softmax": "softmax",
    "bmm": "product of two activations",
    "addmm": "product with a weight outside a layer",
    "mm": "product with a weight outside a layer",
    "convolution": "convolution outside a layer",
    "mul": "multiplication",
    "add": "addition",
    "sub": "subtraction",
    "cat": "concatenation",
    "hardswish": "hard-swish",
    "hardsigmoid": "hard-sigmoid",
    "silu": "SiLU",
    "gelu": "GELU",
    "native_multi_head_attention": "attention",
    "_native_multi_head_attention": "attention",
    "_transformer_encoder_layer_fwd": "transformer layer",
    "upsample_bilinear2d": "bilinear upsampling",
}


def words(operation: str) -> str:
    """An operation's name for people.

    >>> words("native_layer_norm"), words("erf")
    ('layer normalization', 'erf')
    """
    if "scaled_dot_product" in operation:
        return "attention product"
    return "batch normalization" if "batch_norm" in operation else WORDS.get(operation, operation)


def named(quantizer: Quantizer | None) -> str:
    """A quantizer in a table's cell: its class and its bits."""
    return "float" if quantizer is None else f"{type(quantizer).__name__} {quantizer.bits}"


def sized(tensor: Tensor) -> str:
    """A tensor's shape in a table's cell, such as 64×3×7×7."""
    return "×".join(str(size) for size in tensor.shape)


def float_operations(graph: Graph, streams: Streams, covered: set[str]) -> Iterator[Row]:
    """A row for every operation on the network's values that stays float, once a module.

    Args:
        graph: the recorded pass.
        streams: what was made integer around the layers.
        covered: paths of the layers that have rows of their own.
    """
    reasons = {(module, operation): why for module, operation, why in streams.missed}
    told: set[tuple[str, str]] = set()
    for call in graph.flow.calls:
        key = (call.module, call.operation)
        if key in told or call.module in covered or not _computes(graph, streams, call):
            continue
        told.add(key)
        note = reasons.get(key, _reason(call))
        shape = sized(graph.flow.values[call.outputs[0]])
        yield Row(call.module, words(call.operation), shape, "", "", "", note)


def _computes(graph: Graph, streams: Streams, call: Call) -> bool:
    """Whether an operation changes values of the network in float: not just moved, folded or done on integers."""
    if not call.outputs or call.outputs[0] not in graph.alive or call.operation in MOVES | RECTIFIERS | MAXIMA | MEANS:
        return False
    if "batch_norm" in call.operation:
        maker = graph.makers.get(call.inputs[0])
        return maker is None or maker.operation not in PRODUCTS or graph.normalized(call.inputs[0]) is None
    return not (call.operation in JOINS and call.outputs[0] in streams.joined)


def _reason(call: Call) -> str:
    if "batch_norm" in call.operation:
        return "float: it does not directly follow a convolution, so it cannot be folded into one"
    if call.operation in JOINS:
        return "float: what it joins is float"
    if call.operation == "bmm" or "scaled_dot_product" in call.operation or "attention" in call.operation:
        return "float: no layer's weight takes part"
    return "float"


def missed_streams(streams: Streams, covered: set[str]) -> Iterator[Row]:
    """A row for every layer whose result could not be kept in integers."""
    for missed in streams.missed:
        if missed.module in covered:
            yield Row(missed.module, _of(missed), "", "", "", "float", missed.why)


def _of(missed: Missed) -> str:
    return f"result of {words(missed.operation).removesuffix(' outside a layer')}"


def table(rows: Iterable[Row]) -> Table:
    """The rows as a table for the terminal, what stays float or loses something in yellow."""
    made = Table("layer", "kind", "shape", "weight", "input", "stream", "remark")
    for row in rows:
        made.add_row(*row, style="yellow" if row.note else None)
    return made
