"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest

from galago.catalogue import Idea, ideas

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "galago"
SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in SOURCES}

FOLDERS = {"augment", "blocks", "corrupt", "datasets", "deploy", "distill", "models", "probes", "prune", "quantize"} | {
    "regularize",
    "search",
    "tasks",
}

# What the files of a folder have in common, and may import. Everything else in it is an idea of its own.
BASES = {
    "augment": {"rectangles"},
    "corrupt": {"blur", "corruption", "digital", "draws", "liquid", "loading", "noise", "primitives", "published"}
    | {"weather"},
    "datasets": {
        "augmentation",
        "balance",
        "degraded",
        "download",
        "image_files",
        "images",
        "listing",
        "loading",
        "source",
    },
    "distill": {"adjust", "branches", "distill", "divergence", "ensemble", "joint_training", "junctions", "lesson"}
    | {"sizes", "teacher", "trials", "widen"},
    "models": {"lif", "weights"},
    "probes": {"detection", "embedding", "selective", "stepping"},
    "prune": {"blocks", "cost", "full", "groups", "moves", "products", "surgery", "survey", "ties"},
    "quantize": {"blocks", "calibration", "columns", "fold", "graph", "inventory", "layer", "learned_step", "patterns"}
    | {"placement", "plan", "quantizer", "ranges", "reconstruction", "rest", "rounding", "settle", "soft_rounding"}
    | {"moments", "units", "budget", "sensitivity", "wrapping"},
    "regularize": {
        "auxiliary",
        "grouping",
        "muting",
        "operators",
        "refined_targets",
        "residual",
        "scores",
    },
    "search": {"cell_network", "relaxation", "space", "student", "super_network"},
    "tasks": {"classify"},
}
# The promise of every quantizer and of every neuron: what is quantized, and what spikes, can be recognized anywhere. So
# can what shows where a network looks, networks that answer together, and where a module goes that changes what layers
# give out, quantized or not.
PROMISE = {"quantize.quantizer", "quantize.gradient_quantizer", "quantize.layer", "quantize.fold", "models.lif"}
PROMISE |= {"models.attention_branch", "models.ensemble", "quantize.wrapping"}
# These put ideas to use; they are no ideas, and no idea imports them.
COMMANDS = {"cli", "commands", "measure", "ship", "trust"}
# The user's own names, passed on as they are: losses of a step, attributes of an ONNX node.
NAMES_TO_PASS_ON = {"Step.add", "Packer.add"}
LAWS = {"testing", *(name for name in NAMES.values() if name.startswith("laws."))}


def imported(tree: ast.AST, inside_functions: bool) -> Iterator[str]:
    """Modules of Galago that are imported, without the package's name; those inside functions only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "galago":
            path = (node.module or "").removeprefix("galago").removeprefix(".")
            names = [f"{path}.{alias.name}".strip(".") for alias in node.names]
            yield from (name if name in NAMES.values() else path for name in names)
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("galago.") for a in node.names if a.name.startswith("galago."))
        yield from imported(node, inside_functions)


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    return {name for name in imported(ast.parse(path.read_text()), inside_functions) if name}


def folder(name: str) -> str:
    return name.partition(".")[0] if "." in name else ""


def is_idea(name: str) -> bool:
    return folder(name) in FOLDERS


def may_import(name: str, other: str) -> bool:
    """Whether one module of an idea may import another of Galago."""
    if not is_idea(other):
        return other not in COMMANDS | LAWS
    home, own = folder(name), name.rpartition(".")[2]
    if other in PROMISE or other.removeprefix(f"{home}.") in BASES.get(home, ()):
        return True
    if home == "deploy":  # one way from a network to a file, told in several files; its report tells what was measured
        return folder(other) == "deploy" or (name.startswith("deploy.report.") and folder(other) == "probes")
    return folder(other) == home and own.startswith(f"{other.rpartition('.')[2]}_")  # `ewgs_delta` continues `ewgs`


def by_name(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[NAMES[path] for path in paths])


SPINE = [path for path, name in NAMES.items() if "." not in name and name not in COMMANDS | LAWS]
IDEAS = [path for path, name in NAMES.items() if is_idea(name)]


def test_there_are_a_spine_and_ideas_to_check() -> None:
    assert {"batch", "task", "data", "method", "trainer", "probe", "layers", "run", "errors"} <= {
        NAMES[path] for path in SPINE
    }
    assert {"augment.cutmix", "distill.logits", "quantize.quantizer"} <= {NAMES[path] for path in IDEAS}


@by_name(SPINE)
def test_the_spine_imports_no_idea(path: Path) -> None:
    assert not [other for other in imports(path) if is_idea(other) or other in COMMANDS - {"cli"}]


@by_name(IDEAS)
def test_an_idea_imports_the_spine_and_its_folders_base_only(path: Path) -> None:
    assert not [other for other in imports(path) if not may_import(NAMES[path], other)]


def test_a_file_that_breaks_the_rule_of_imports_would_be_found() -> None:
    tree = ast.parse(
        "from galago.augment.mixup import Mixup\n"
        "def f():\n    import galago.distill.logits\n    from galago import ship"
    )
    assert set(imported(tree, inside_functions=True)) == {"augment.mixup", "distill.logits", "ship"}
    assert set(imported(tree, inside_functions=False)) == {"augment.mixup"}
    for other in ("augment.mixup", "distill.logits", "ship"):
        assert not may_import("augment.cutmix", other)
    for other in ("method", "quantize.layer"):
        assert may_import("augment.cutmix", other)


def test_the_laws_and_the_command_line_import_ideas_only_where_they_use_them() -> None:
    for path, name in NAMES.items():
        if name in LAWS | {"cli", "commands"}:
            early = {other for other in imports(path, inside_functions=False) if is_idea(other)}
            assert early <= (PROMISE if name in LAWS else set()), name


def test_no_file_is_called_after_nothing() -> None:
    nothing = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core"}
    assert not [name for path, name in NAMES.items() if {*name.split("."), path.parent.name} & nothing]


@by_name([path for path in SOURCES if path.name != "__init__.py"])
def test_a_module_says_what_it_is_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module begins with its page"
    assert len(text.splitlines()) <= 300, "a file is about one idea"


def test_folders_only_hold_files() -> None:
    filled = [path for path in SOURCES if path.name == "__init__.py" and path.read_text().strip()]
    assert filled == [PACKAGE / "__init__.py"]


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, list[str]]]:
    """Functions and methods on a module's surface, with the bases of their class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node, []
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            yield from ((f"{node.name}.{f.name}", f, bases) for f in node.body if isinstance(f, ast.FunctionDef))


@by_name(SOURCES)
def test_public_signatures_name_every_argument(path: Path) -> None:
    for name, function, bases in public_functions(ast.parse(path.read_text())):
        private = name.rpartition(".")[2].startswith("_") and not name.endswith("__init__")
        passes_on = name in NAMES_TO_PASS_ON or (name.endswith(".forward") and {"Wrapper", "Restable"} & {*bases})
        assert function.args.kwarg is None or private or passes_on, f"{name} takes **{function.args.kwarg.arg}"


def kept(node: ast.AST) -> set[str]:
    """Attributes that a class assigns on itself, directly or through `self.__dict__`."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self":
            found.add(part.attr)
        if isinstance(part, ast.Call):
            called = ast.unparse(part.func)
            if called == "self.__dict__.update":
                found.update(keyword.arg for keyword in part.keywords if keyword.arg)
            if called in ("self.register_buffer", "self.register_parameter") and isinstance(part.args[0], ast.Constant):
                found.add(part.args[0].value)
        if isinstance(part, ast.FunctionDef) and any(ast.unparse(d) == "property" for d in part.decorator_list):
            found.add(part.name)
    return found


NAMED = [idea for idea in ideas() if idea.kind not in ("model", "optimizer")]  # which keep arguments in their own way


@pytest.mark.parametrize("idea", NAMED, ids=lambda idea: idea.class_path)
def test_what_a_recipe_may_name_keeps_its_arguments(idea: Idea) -> None:
    module, _, name = idea.class_path.rpartition(".")
    kind = getattr(import_module(module), name)
    own = [one for one in kind.__mro__ if one.__module__.startswith("galago.")]
    found = {name for one in own for name in kept(ast.parse(dedent(inspect.getsource(one))).body[0])}
    wanted = set(inspect.signature(kind).parameters)
    assert wanted <= found, f"{idea.class_path} does not keep {sorted(wanted - found)}"


def test_a_class_that_keeps_no_argument_would_be_found() -> None:
    (node,) = ast.parse("class A:\n    def __init__(self, a, b, c):\n        self.a, self._b = a, b").body
    assert kept(node) == {"a", "_b"}


@pytest.mark.parametrize("home", sorted({i.class_path.rpartition(".")[0] for i in ideas()}))
def test_every_idea_has_a_test_file_in_the_same_place(home: str) -> None:
    _, where, *name = home.split(".")
    assert (ROOT / "tests" / where / f"test_{name[-1]}.py").exists()


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    places = tuple(f"/{place}/" for place in ("work", "root", "home"))
    written = [
        path
        for top in ("src", "tests", "recipes", "docs", "results", "benchmarks")
        for path in (ROOT / top).rglob("*")
        if path.suffix in {".py", ".md", ".yaml", ".html", ".css", ".toml", ".json"}
    ]
    assert not [path for path in written for place in places if place in path.read_text()]


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'numpy', 'lightning', 'onnx'}"
    code = f"import sys, galago; assert not {heavy} & set(sys.modules); galago.Batch; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
