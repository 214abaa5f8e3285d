"""Peak memory: how much more a process needs to hold one more copy of a network and to run it once.

A fresh copy is made (a file is opened again in its engine, a PyTorch network is copied) and answers one batch; the
figure is the highest memory in between minus that before, so it holds weights, activations and what the engine keeps,
but not the libraries, which an earlier run has loaded already.

On a GPU it counts what PyTorch's allocator handed out, to the byte. On a CPU it is the resident memory of the process
as Linux counts it (`VmHWM`, reset beforehand), after memory that was free has been returned: a page is 4 kB and
allocators round up, so differences below about 1 MB mean nothing. Other systems do not let a process reset its peak;
there the probe gives no number.

When to use it: for devices with little memory, and to see what a larger batch costs. A network whose quantization is
simulated in PyTorch needs more than float; measure its file.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from pathlib import Path

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.probe import Probe, device_of, evaluating
from galago.spec import build, describe
from galago.task import Task

_PROCESS = Path("/proc/self")


class PeakMemory(Probe):
    """`peak_memory_mb`: megabytes for one more copy of the network and one run of it.

    Args:
        batch_size: images in that run.
    """

    def __init__(self, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise UserError(f"PeakMemory: batch_size is {batch_size}; give 1 or more")
        self.batch_size = batch_size

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        device = device_of(deployed)
        image = data.example().repeat(self.batch_size, 1, 1, 1).to(device)
        with torch.inference_mode(), evaluating(deployed):
            deployed(image)  # loads what is loaded once a process
            found = _on_gpu(deployed, image) if device.type == "cuda" else _on_cpu(deployed, image)
        return {} if found is None else {"peak_memory_mb": found / 1e6}


def _on_gpu(deployed: nn.Module, image: Tensor) -> int:
    torch.cuda.synchronize(image.device)
    before = torch.cuda.memory_allocated(image.device)
    torch.cuda.reset_peak_memory_stats(image.device)
    _fresh(deployed)(image)
    torch.cuda.synchronize(image.device)
    return torch.cuda.max_memory_allocated(image.device) - before


def _on_cpu(deployed: nn.Module, image: Tensor) -> int | None:
    gc.collect()
    _return_free_memory()
    if not _reset_peak():
        return None
    before = _resident("VmRSS")
    _fresh(deployed)(image)
    return max(0, _resident("VmHWM") - before)


def _fresh(deployed: nn.Module) -> nn.Module:
    """One more of the same: a file opened again, or a copy."""
    again: nn.Module = build(describe(deployed)) if hasattr(deployed, "path") else copy.deepcopy(deployed)
    return again


def _return_free_memory() -> None:
    """Asks the C library to hand back what it keeps for later; without it old blocks would be reused unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this kernel does not report {name}")
