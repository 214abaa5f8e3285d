"""BatchNorm's statistics, measured anew for the weights as they are.

A running mean and variance average over the networks of the last few hundred steps. Where the network that ships is
none of these (quantized at few bits, an average of many), its statistics are simply measured, batch after batch:

    mean = (1 / N) sum mean_batch,   var = (1 / N) sum var_batch (unbiased),   over N training batches
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from galago.console import watched
from galago.data import Data
from galago.errors import UserError
from galago.probe import device_of, evaluating, normalized


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm that keeps statistics."""
    return [part for part in model.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


@torch.no_grad()
def measure_norms(model: nn.Module, data: Data, batches: int) -> None:
    """Sets the statistics of every BatchNorm to their mean over training batches. Nothing else changes.

    Raises:
        UserError: there is no training batch.
    """
    if not len(data.train()):
        raise UserError("the data give no training batch to measure BatchNorm on; make batch_size smaller")
    norms, device = norms_of(model), device_of(model)
    momenta = [norm.momentum for norm in norms]
    cuda = [device] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(cuda), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(data.seed)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # all batches count the same
            norm.train()
        for batch in watched(islice(data.train(), batches), "BatchNorm", batches):
            model(normalized(data, batch.input, device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
