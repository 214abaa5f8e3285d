"""Every code block of the README and of docs/ is run as a reader would run it."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from galago import cli, measure, ship

ROOT = Path(__file__).resolve().parent.parent
DOCS = [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))]
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", *DOCS]


class Block(NamedTuple):
    """A fenced block of a page; `file` is its title, where it has one."""

    language: str
    file: str
    text: str


def blocks(page: str) -> list[Block]:
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    found = []
    for token in tokens:
        if token.type == "fence":
            title = re.search(r'title="([^"]+)"', token.info)
            found.append(Block(token.info.partition(" ")[0], title[1] if title else "", token.content))
    return found


def files(page: str) -> dict[str, str]:
    """The files that a page tells its reader to write; blocks of one title make one file."""
    written: dict[str, str] = {}
    for block in blocks(page):
        if block.file:
            written[block.file] = written.get(block.file, "") + block.text
    return written


def commands(page: str) -> list[list[str]]:
    """The `galago` commands that a page shows, as lists of arguments."""
    lines = [line for block in blocks(page) if block.language == "console" for line in block.text.splitlines()]
    return [shlex.split(line.removeprefix("$ galago ")) for line in lines if line.startswith("$ galago ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder that is on the import path, as a reader has it; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(page: str, folder: Path) -> None:
    for name, text in files(page).items():
        (folder / name).write_text(text)


def test_a_method_a_quantizer_and_a_probe_of_ones_own_obey_the_laws(folder: Path) -> None:
    write("docs/extending.md", folder)
    laws = {name: law for name, law in runpy.run_path("test_my_ideas.py").items() if name.startswith("test_")}
    assert len(laws) == 4
    for law in laws.values():
        law()


def test_ideas_of_ones_own_train_and_ship_from_a_recipe(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "ROUNDS", 5)  # for time: exact intervals are not what this is about
    monkeypatch.setattr(measure, "SECONDS", 0.05)
    write("docs/extending.md", folder)
    shown = commands("docs/extending.md")
    assert [arguments[0] for arguments in shown] == ["check", "ship", "measure"]
    for arguments in shown:
        assert cli.main(arguments) == 0, capsys.readouterr().err
    assert '"worst_class_accuracy"' in capsys.readouterr().out
    assert cli.main(["train", "--config", "my_recipe.yaml"]) == 0, "a finished run is found again"
    assert {"model.onnx", "model.xml", "model.bin", "verify.json", "report.html"} <= set(os.listdir("runs/mine"))


def test_a_run_with_ideas_of_ones_own_is_not_loaded_unless_they_are_allowed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("docs/extending.md", folder)
    assert cli.main(["train", "--config", "my_recipe.yaml", "--epochs", "1"]) == 0
    assert cli.main(["measure", "--run", "runs/mine"]) == 2
    assert "my_ideas" in capsys.readouterr().err


def photographs(folder: Path) -> None:
    for number, name in enumerate(("apple", "fig", "pear")):
        (folder / name).mkdir(parents=True)
        for copy in range(12):
            shade = Image.new("RGB", (40 + copy, 50), (80 * number, 10 * copy, 90))
            shade.save(folder / name / f"{copy}.jpg")


def test_the_recipe_for_ones_own_images_is_sound(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As printed but for what would need the internet or time: random weights, small images and batches."""
    write("README.md", folder)
    photographs(folder / "photos")
    small = ["--model.init_args.pretrained=false", "--data.init_args.size=32", "--data.init_args.batch_size=8"]
    assert cli.main(["check", "--config", "photos.yaml", *small, "--data.init_args.workers=0"]) == 0
    shown = capsys.readouterr()
    assert "conv1" in shown.out
    assert "the recipe is sound: 10 epochs" in shown.err


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page: str, folder: Path) -> None:
    """Blocks without a title are one session."""
    session: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and not block.file:
            exec(compile(block.text, page, "exec"), session)


@pytest.mark.parametrize("page", PAGES)
def test_links_within_a_page_lead_to_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_a_page_shows_exist(page: str) -> None:
    shown = [arguments[0] for arguments in commands(page)]
    assert set(shown) <= {*cli.COMMANDS, "--help"}


@pytest.mark.parametrize("page", PAGES)
def test_class_paths_that_a_page_names_exist(page: str) -> None:
    from importlib import import_module

    for path in set(re.findall(r"class_path: (galago\.[\w.]+)", (ROOT / page).read_text())):
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name), path


def test_the_map_of_the_spine_names_every_file_and_no_other() -> None:
    here = {path.name for path in (ROOT / "src/galago").glob("*.py")} - {"__init__.py"}
    text = (ROOT / "ARCHITECTURE.md").read_text().partition("## The map")[2].partition("## The nouns")[0]
    spine = text.partition("├── quantize/")[0].partition("src/galago/")[2]
    assert set(re.findall(r"\w+\.py", spine)) == here


@pytest.mark.parametrize("name", ["quantize", "deploy"])
def test_the_map_of_a_folder_names_only_files_that_exist(name: str) -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text().partition("## The map")[2].partition("## The nouns")[0]
    part = re.split(r"\n[├└]── ", text.partition(f"── {name}/")[2])[0]
    named = set(re.findall(r"\w+\.py", part))
    assert len(named) > 8
    assert not named - {path.name for path in (ROOT / "src/galago" / name).glob("*.py")}


def test_every_link_of_the_built_documentation_leads_somewhere(tmp_path: Path) -> None:
    built = runpy.run_path(str(ROOT / "docs/build.py"))["build"](tmp_path)
    assert (tmp_path / "quantize-ewgs.html") in built
    for page in built:
        for address in re.findall(r'(?:href|src)="([^"#]+)', page.read_text()):
            assert address.startswith("https://") or (tmp_path / address).exists(), f"{page.name}: {address}"


def test_a_method_page_shows_arguments_with_their_defaults(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs/build.py"))["build"](tmp_path)
    assert "<dt>per_channel = True</dt>" in (tmp_path / "quantize-lsq.html").read_text()
