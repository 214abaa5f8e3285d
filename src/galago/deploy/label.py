"""Names in an exported graph: which layer each operation belongs to, and where each stream's codes can be read.

Nodes are called `<module path>/<operator>` and carry the path as `galago.module`; codes are the value
`<module path>/codes`. Layers that encode the same tensor in the same way share one value: `galago.streams`, in the
model's metadata, gives the value of every stream. What the exporter noted of the machine (source paths, stack traces)
is removed.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

MODULE, STREAMS = "galago.module", "galago.streams"
CODES = "/codes"


def label(model: ir.Model, streams: Sequence[str]) -> None:
    """Names everything after its layer.

    Args:
        model: as exported, with the exporter's notes; changed in place.
        streams: paths of the integer streams in the network.
    """
    seen: Counter[str] = Counter()
    for node in model.graph:
        module = module_of(node)
        node.name = unique(f"{module}/{node.op_type}", seen)
        node.metadata_props.clear()
        node.metadata_props[MODULE] = module
        node.doc_string = None
    values = name_codes(model)
    for value in (*model.graph.initializers.values(), *(out for node in model.graph for out in node.outputs)):
        value.metadata_props.clear()
    for value in list(model.graph.initializers.values()):
        value.name = (value.name or "").removeprefix("deployed.network.")
    model.metadata_props.clear()
    found = {path: values[path] for path in streams if path in values}
    if found:
        model.metadata_props[STREAMS] = json.dumps(found)


def name_codes(model: ir.Model) -> dict[str, str]:
    """Names the codes that DequantizeLinear nodes read; gives the value's name for each stream, shared or not."""
    seen: Counter[str] = Counter()
    own: dict[str, str] = {}
    shared: dict[str, str] = {}
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.producer() is None:
            continue
        if not (codes.name or "").endswith(CODES):
            codes.name = unique(f"{node.metadata_props[MODULE]}{CODES}", seen)
        own.setdefault(node.metadata_props[MODULE], str(codes.name))
        shared.update({stream_of(reader): str(codes.name) for reader in node.outputs[0].consumers()})
    return shared | own  # a pooling's own stream, too, comes before what its reading of another would suggest


def stream_of(reader: ir.Node) -> str:
    """The path that the input stream of a layer has, from the path of the layer itself inside its wrapper."""
    path = reader.metadata_props[MODULE]
    return "stream" if path == "layer" else f"{path.removesuffix('.layer')}.stream"


def module_of(node: ir.Node) -> str:
    """Path of the module a node came from: in the network, or `normalize` and `task` around it."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    return path.removeprefix("deployed.").removeprefix("network.") or "network"


def unique(name: str, seen: Counter[str]) -> str:
    """The name, numbered from its second use on."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}_{seen[name]}"
