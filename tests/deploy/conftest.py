"""Files that several tests read: exported once."""

from __future__ import annotations

import pytest
import torch

from galago.deploy import onnx, openvino
from integers import STREAMS, Exported, PerChannel, Ranged, Zoo, deployed, images, quantize, shaken


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A 4-bit network with 8-bit streams, in both files."""
    torch.manual_seed(1)
    folder, image = tmp_path_factory.mktemp("zoo"), images(16)
    whole = deployed(shaken(Zoo()))
    quantize(whole.network, whole.normalize(image), PerChannel, lambda: Ranged(4), Ranged, STREAMS)
    onnx.export(whole, image[:1], folder / "zoo.onnx")
    openvino.export(whole, image[:1], folder / "zoo.xml")
    return Exported(whole, onnx.lowered(whole, image[:1]), folder / "zoo.onnx", folder / "zoo.xml")
