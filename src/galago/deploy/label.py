"""Names in an exported graph: which layer each operation belongs to, and where each stream's codes can be read.

Nodes are called `<module path>/<operator>`; a stream's codes are the value `<module path>/codes`. Layers that encode
the same tensor in the same way share one value: `galago.streams`, in the model's metadata, gives the value of every
stream whose codes go by another's name. So do streams behind equal operations on the same tensor, which the exporter
makes one (DLA pools an image twice): the network itself is asked who gives the same codes. What the exporter noted of
the machine (source paths, stack traces) is removed, and so is what says no more than the standard does, for a small
network's file is mostly its graph.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import onnx
import onnx_ir as ir

STREAMS = "galago.streams"
CODES = "/codes"


def label(model: ir.Model, streams: Sequence[str], twins: Callable[[], Mapping[str, Sequence[str]]]) -> None:
    """Names everything after its layer.

    Args:
        model: as exported, with the exporter's notes; changed in place.
        streams: paths of the integer streams in the network.
        twins: gives for each stream those of the same codes; asked only if a stream is not found.
    """
    seen: Counter[str] = Counter()
    for node in model.graph:
        module = module_of(node)
        node.name = unique(f"{module}/{node.op_type}", seen)
        node.metadata_props.clear()
        node.doc_string = None
        drop_defaults(node)
    values = name_codes(model)
    if missing := [path for path in streams if path not in values]:
        alike = twins()
        values |= {path: values[twin] for path in missing for twin in alike[path] if twin in values}
    for value in (*model.graph.initializers.values(), *(out for node in model.graph for out in node.outputs)):
        value.metadata_props.clear()
    for value in list(model.graph.initializers.values()):
        value.name = (value.name or "").removeprefix("deployed.network.")
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props[STREAMS] = json.dumps(
        {path: values[path] for path in streams if values.get(path, path + CODES) != path + CODES}
    )


def drop_defaults(node: ir.Node) -> None:
    """Removes attributes that have the value which the standard gives them anyway."""
    if node.domain:
        return
    defined = onnx.defs.get_schema(node.op_type, node.graph.opset_imports[""]).attributes if node.graph else {}
    for name, attribute in list(node.attributes.items()):
        if name in ("dilations", "strides") and set(attribute.as_ints()) == {1}:  # for every number of dimensions
            del node.attributes[name]
            continue
        usual = defined[name].default_value if name in defined else None
        if usual and usual.type == attribute.type.value and onnx.helper.get_attribute_value(usual) == plain(attribute):
            del node.attributes[name]


def plain(attribute: ir.Attr) -> object:
    """An attribute's value as `onnx.helper` gives it, text as bytes."""
    return attribute.value.encode() if isinstance(attribute.value, str) else attribute.value


def place(node: ir.Node) -> str:
    """The module path in a node's name."""
    return (node.name or "").rpartition("/")[0]


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
            codes.name = unique(f"{place(node)}{CODES}", seen)
        own.setdefault(place(node), str(codes.name))
        shared.update({stream_of(reader): str(codes.name) for reader in node.outputs[0].consumers()})
    return shared | own  # a pooling's own stream, too, comes before what its reading of another would suggest


def stream_of(reader: ir.Node) -> str:
    """The path that the input stream of a layer has, from the path of the layer itself inside its wrapper."""
    path = place(reader)
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
