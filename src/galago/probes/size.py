"""Size: bytes on disk of what is shipped.

For a file made from a network: that file and the files that belong to it (the .bin of an OpenVINO .xml, the external
data of an .onnx). For a network in PyTorch: its state dict as a safetensors file, the way a run keeps it; quantized
layers are still float there, so the figure does not shrink with the bits. 1 MB is 1,000,000 bytes.

When to use it: always; it is the number that a user of the file sees. `galago.probes.cost` predicts it from the bits.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import nn

from galago.data import Data
from galago.errors import UserError
from galago.probe import Deployed, Probe
from galago.task import Task


def files_of(path: Path) -> list[Path]:
    """A model file and the files that belong to it.

    Args:
        path: .onnx, .xml or anything else.

    Raises:
        UserError: one of them is missing.
    """
    beside = {".xml": [path.with_suffix(".bin")], ".onnx": sorted(path.parent.glob(f"{path.name}[._]data"))}
    files = [path, *beside.get(path.suffix, [])]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]} does not exist; export again, or keep the files of one model together")
    return files


def bytes_on_disk(path: Path) -> int:
    """The size of a model file with the files that belong to it."""
    return sum(file.stat().st_size for file in files_of(path))


def bytes_as_safetensors(network: nn.Module) -> int:
    """The size that the network's weights and buffers have as a safetensors file."""
    return len(save({name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}))


class Size(Probe):
    """`file_mb`: megabytes of the file, or of the network's weights as a safetensors file."""

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        path = getattr(deployed, "path", None)
        if path is not None:
            return {"file_mb": bytes_on_disk(Path(path)) / 1e6}
        network = deployed.network if isinstance(deployed, Deployed) else deployed
        return {"file_mb": bytes_as_safetensors(network) / 1e6}
