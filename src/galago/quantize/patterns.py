"""Which layers a recipe means: by patterns of paths and type names, and as the first and last ones."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from galago.quantize.graph import Graph


def matches(pattern: str, path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a pattern means a module: by its path or type, or by those of a module it lies in."""
    parts = path.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(p, pattern) or fnmatchcase(type(modules[p]).__name__, pattern) for p in around)


def edge_layers(graph: Graph, layers: dict[str, nn.Module]) -> set[str]:
    """Paths of the layers that read what the first one reads, and of those that make the network's output."""
    ran = [path for path in graph.flow.received if path in layers]
    if not ran:
        return set()
    first = {path for path in ran if graph.flow.received[path][0] == graph.flow.received[ran[0]][0]}
    last = {path for path in ran if any(graph.reading(number).leaves for number in graph.flow.gave[path][-1])}
    return first | last | {ran[-1]}
