"""From a deployed network to OpenVINO's own two files, `*.xml` (the graph) and `*.bin` (the weights).

Written from the ONNX model with weights as plain int8: OpenVINO computes convolutions and linear layers on it with
integers, whether the streams between them are integer or float, but would unpack packed weights anew at every
inference. Weights of 8 bits and less take a byte each in the file; what is float stays float32.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import openvino
from torch import Tensor

from galago.deploy.onnx import build
from galago.deploy.reading import first_line
from galago.errors import UserError
from galago.probe import Deployed


def export(deployed: Deployed, example: Tensor, path: Path, float_image: bool = False) -> list[Path]:
    """Writes the OpenVINO files.

    Args:
        deployed: trained, with or without quantized layers.
        example: one raw image, 1×C×H×W, uint8.
        path: of the graph, `*.xml`; the weights go beside it, `*.bin`.
        float_image: take images as float in 0 … 1 instead of uint8.

    Returns:
        Both files.

    Raises:
        UserError: the network cannot be exported; the layer is named.
    """
    model = build(deployed, example, float_image)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory() as folder:
            onnx.save(model, Path(folder) / "model.onnx")
            converted = openvino.Core().read_model(Path(folder) / "model.onnx")
            openvino.save_model(converted, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise UserError(f"{path}: OpenVINO cannot take this network: {first_line(error)}") from error
    return [path, path.with_suffix(".bin")]
