"""What there is: every idea with its class path, paper, kind and recipe, read from the modules themselves.

Nothing is imported: the source is parsed, so that listing is quick and needs no registry. A module's docstring is its
page; its first line names the idea, `arXiv:` its paper, `recipes/….yaml` the recipe that reproduces it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

KINDS = {
    "Method": "method",
    "Quantizer": "quantizer",
    "GradientQuantizer": "quantizer of gradients",
    "Lesson": "distillation loss",
    "Probe": "probe",
    "OutputProbe": "probe",
    "ViewsProbe": "probe",
    "Corruption": "corruption",
    "Task": "task",
    "Classify": "task",
    "Data": "data set",
    "ImageData": "data set",
    "SGD": "optimizer",
    "AdamW": "optimizer",
}
FOLDERS = (
    "augment",
    "corrupt",
    "datasets",
    "distill",
    "models",
    "probes",
    "prune",
    "quantize",
    "regularize",
    "search",
    "tasks",
)


class Idea(NamedTuple):
    """One entry of the catalogue."""

    class_path: str
    name: str
    kind: str
    system: str  # as its paper names it: the first line of the module's page; empty without a paper
    summary: str
    paper: str
    recipe: str


def ideas() -> list[Idea]:
    """Every public class and model function of the idea folders, in order of class path."""
    package = Path(__file__).parent
    found: list[Idea] = []
    for folder in FOLDERS:
        for source in sorted((package / folder).rglob("*.py")):
            module = ".".join(["galago", *source.relative_to(package).with_suffix("").parts])
            found.extend(_of_module(module, ast.parse(source.read_text())))
    return sorted(found)


def _of_module(module: str, tree: ast.Module) -> list[Idea]:
    page = ast.get_docstring(tree) or ""
    paper = re.search(r"arXiv[:\s]*(\d{4}\.\d{4,5})", page)
    recipe = re.search(r"recipes/[\w./-]+\.yaml", page)
    local = {node.name: _bases(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    found = []
    for node in tree.body:
        kind = _kind(node, module, local)
        if kind and isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            summary = (ast.get_docstring(node) or page).partition("\n")[0]
            source = f"arXiv:{paper[1]}" if paper else ""
            path = recipe[0] if recipe else ""
            system = page.partition("\n")[0].removesuffix(".") if paper else ""
            found.append(Idea(f"{module}.{node.name}", node.name, kind, system, summary, source, path))
    return found


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def _kind(node: ast.stmt, module: str, local: dict[str, list[str]]) -> str:
    """What an idea is, by the noun it derives from, directly or through a class of its own module."""
    if isinstance(node, ast.FunctionDef):
        made = ast.unparse(node.returns) if node.returns else ""
        return "model" if module.startswith("galago.models.") and made == "nn.Module" else ""
    if not isinstance(node, ast.ClassDef):
        return ""
    abstract = any(isinstance(part, ast.Name) and part.id == "abstractmethod" for part in ast.walk(node))
    if abstract or "ABC" in _bases(node):
        return ""
    waiting, seen = _bases(node), set[str]()
    while waiting:
        base = waiting.pop(0)
        if base in KINDS:
            return KINDS[base]
        if base not in seen:
            seen.add(base)
            waiting.extend(local.get(base, []))
    return ""
