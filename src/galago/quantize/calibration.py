"""Images for what is set before training, and side trips through a network that leave no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from galago.data import Data
from galago.errors import UserError
from galago.probe import device_of, normalized


def first_inputs(data: Data, batches: int, device: torch.device) -> Tensor:
    """The first training batches as one, normalized.

    Raises:
        UserError: there is no training batch.
    """
    inputs = [normalized(data, batch.input, device) for batch in islice(data.train(), batches)]
    if not inputs:
        raise UserError("the data give no training batch to set ranges on; make batch_size smaller")
    return torch.cat(inputs)


@contextmanager
def undisturbed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A side trip in float32, with gradients, not compiled, after which buffers and random state are as before."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    device = next((buffer.device for buffer, _ in buffers), device_of(modules[0]) if modules else torch.device("cpu"))
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),  # the fused attention kernels have no second derivative
    ):
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.data.copy_(before)
