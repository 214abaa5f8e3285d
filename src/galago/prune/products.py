"""Following channels through layers with weights: convolutions, linear layers, BatchNorm.

A convolution or linear layer reads the channels of what comes in and makes new ones. A depth-wise convolution hands its
channels on, with one filter each; BatchNorm does, with a factor and a shift each. Other grouped convolutions are left
whole, and so is whatever stands on both sides of a weight that is computed from others.
"""

from __future__ import annotations

from galago.layers import Asked, Call
from galago.prune.ties import Ids, Product, Record

UNKNOWN = "the channels that are read with it are not known"


def convolve(record: Record, call: Call, asked: Asked) -> None:
    """`convolution(x, W, bias, stride, padding, dilation, transposed, output_padding, groups)`."""
    read, weight = call.inputs[:2]
    transposed, groups = asked.args[6], asked.args[8]
    image, made = record.values[read], record.values[call.outputs[0]]
    inputs = input_channels(record, read, 1)
    positions = (image if transposed else made)[0, 0].numel()
    if weight not in record.places or inputs is None:
        record.give_up(call)
    elif groups == 1:
        add_product(record, call, weight, (1, 0) if transposed else (0, 1), inputs, positions)
    elif groups == image.shape[1] == made.shape[1]:
        add_product(record, call, weight, (0, None), inputs, positions)
    else:
        reason = f"the convolution {call.module} has {groups} groups"
        record.ties.hold(inputs, reason)
        outputs = record.ties.held(made.shape[1], reason)
        share, kernel = inputs[: len(inputs) // groups], record.values[weight].shape[2:].numel()
        record.products[record.places[weight]] = Product(share, outputs, (0, None), kernel, positions, normalized=True)
        record.gives(call, 1, outputs, silent=False)


def multiply(record: Record, call: Call, asked: Asked) -> None:
    """A linear layer: `addmm(bias, x, W^T)`, `mm(x, W^T)` or `linear(x, W, bias)`."""
    read, given = call.inputs[1:3] if call.operation == "addmm" else call.inputs[:2]
    weight = given if call.operation == "linear" else record.transposed.get(given, -1)
    inputs = input_channels(record, read, record.values[read].ndim - 1)
    if weight not in record.places or inputs is None:
        record.give_up(call)
        return
    made = record.values[call.outputs[0]]
    bias = [number for number in call.inputs if number not in (read, given)]
    call = call._replace(inputs=(read, weight, *bias))  # the order that a convolution has
    add_product(record, call, weight, (0, 1), inputs, made.numel() // made.shape[-1])


def normalize(record: Record, call: Call, asked: Asked) -> None:
    """`native_batch_norm(x, weight, bias, running_mean, running_var, …)` with fixed statistics."""
    given, own = record.known.get(call.inputs[0]), call.inputs[1:]
    if given is None or given.axis != 1 or any(number not in record.known for number in own):
        record.give_up(call)
        return
    for number in own:
        record.ties.tie(record.known[number].ids, given.ids)
    if (affine := is_affine(call)) and (place := record.places[own[0]]) not in record.norms:
        record.norms.append(place)
    record.gives(call, 1, given.ids, silent=affine)


def is_affine(norm: Call) -> bool:
    """Whether a BatchNorm reads a weight and a bias beside its input and its statistics."""
    return len(norm.inputs) == 5


def input_channels(record: Record, read: int, axis: int) -> Ids | None:
    """Of what a layer reads; held ones where they are unknown, None where they lie along another axis."""
    given = record.known.get(read)
    if given is None:
        return record.ties.held(record.values[read].shape[axis], UNKNOWN)
    return given.ids if given.axis == axis else None


def add_product(
    record: Record, call: Call, weight: int, axes: tuple[int, int | None], inputs: Ids, positions: int
) -> None:
    """Notes a layer, or one more run of it, and the channels that it makes."""
    place, shape, separable = record.places[weight], record.values[weight].shape, axes[1] is None
    outputs = inputs if separable else record.ties.new(shape[axes[0]])
    read = record.known.get(call.inputs[0])
    if not separable and read is not None and not read.silent:
        record.ties.hold(
            inputs, f"{place[0]} reads them where they are not zero although all that is stored for them is"
        )
    own = () if separable else inputs
    tie_stored(record, call, weight, axes, inputs, outputs)
    if place in record.products:
        before = record.products[place]
        record.ties.tie(before.outputs, outputs)
        record.ties.tie(before.inputs, own)
        positions += before.positions
    readers = record.seen.consumers(call.outputs[0])
    normalized = len(readers) == 1 and "batch_norm" in readers[0].operation and is_affine(readers[0])
    record.products[place] = Product(own, outputs, axes, shape[2:].numel(), positions, normalized)
    axis = 1 if call.operation == "convolution" else record.values[call.outputs[0]].ndim - 1
    record.gives(call, axis, outputs, silent=True)


def tie_stored(
    record: Record, call: Call, weight: int, axes: tuple[int, int | None], inputs: Ids, outputs: Ids
) -> None:
    """The bias belongs to the output channels; and a weight that is long in one axis has channels by itself."""
    if weight in record.known:
        own = record.known[weight]
        record.ties.tie(own.ids, outputs if own.axis == axes[0] else inputs)
    for bias in call.inputs[2:]:
        if bias in record.known:
            record.ties.tie(record.known[bias].ids, outputs)
        elif bias not in record.places:
            record.ties.hold(outputs, f"the bias of {call.module} is computed")
