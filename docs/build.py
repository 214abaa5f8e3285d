"""Builds the documentation into site/: the pages of the project, and a page a method from its module's docstring.

    python docs/build.py [folder]

Needs nothing but what Galago itself installs, and nothing from the network, neither now nor when the pages are read.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from galago.catalogue import Idea, ideas

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
PAGES = {
    "README.md": "index.html",
    "docs/choosing.md": "choosing.html",
    "docs/extending.md": "extending.html",
    "ARCHITECTURE.md": "architecture.html",
    "CONTRIBUTING.md": "contributing.html",
    "CHANGELOG.md": "changelog.html",
}
MENU = {
    "index.html": "Galago",
    "choosing.html": "Choosing",
    "extending.html": "Extending",
    "methods.html": "Methods",
    "architecture.html": "Architecture",
    "contributing.html": "Contributing",
    "changelog.html": "Changes",
}
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --link: light-dark(#0a58a8, #7db7ff) }
body { margin: 0 auto; max-width: 62rem; padding: 0 1.2rem 4rem; font: 1rem/1.55 system-ui, sans-serif }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; padding: 1rem 0; border-bottom: 1px solid var(--line) }
a { color: var(--link) } nav a { text-decoration: none } nav a[aria-current] { font-weight: 650; color: inherit }
code, pre { font: .88em/1.5 ui-monospace, monospace; background: var(--soft); border-radius: .25rem }
code { padding: .1em .25em } pre { padding: .8rem 1rem; overflow-x: auto } pre code { padding: 0; background: none }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
img { max-width: 100% } dt { font-family: ui-monospace, monospace; font-size: .88em } dd { margin: 0 0 .4rem 2rem }
h1, h2, h3 { line-height: 1.25 }
"""


def build(folder: Path) -> list[Path]:
    """Writes every page; their paths.

    Args:
        folder: where to; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [write(folder / name, name, with_pages(render(ROOT / page), page)) for page, name in PAGES.items()]
    found = by_module(ideas())
    written.append(write(folder / "methods.html", "methods.html", index(found)))
    for module, members in found.items():
        written.append(write(folder / page_of(module), "methods.html", method_page(module, members)))
    for picture in sorted((ROOT / "docs").glob("*.png")):
        shutil.copy(picture, folder / picture.name)
    return written


def write(path: Path, current: str, body: str) -> Path:
    """One page with its menu."""
    heading = re.search(r"<h1>(.*?)</h1>", body)
    title = re.sub(r"<.*?>", "", heading[1]) if heading else "Galago"
    menu = "".join(
        f'<a href="{name}"{" aria-current=page" if name == current else ""}>{label}</a>' for name, label in MENU.items()
    )
    path.write_text(
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><body><nav>{menu}</nav>\n<main>\n{body}</main>\n</body></html>\n"
    )
    return path


def render(page: Path) -> str:
    """Markdown to HTML."""
    return markdown(page.read_text())


def markdown(text: str) -> str:
    """Markdown text to HTML."""
    html: str = MarkdownIt("commonmark").enable("table").render(text)
    return html


def with_pages(html: str, page: str) -> str:
    """The same HTML with links that lead to other pages of the site; what is not on the site is no link any more."""

    def lead(match: re.Match[str]) -> str:
        address, mark, text = match[1], match[2] or "", match[3]
        if address.startswith(("http://", "https://")) or not address:
            return match[0]
        target = ((ROOT / page).parent / address).resolve().relative_to(ROOT).as_posix()
        return f'<a href="{PAGES[target]}{mark}">{text}</a>' if target in PAGES else text

    html = re.sub(r'<a href="([^"#]*)(#[^"]*)?">(.*?)</a>', lead, html, flags=re.DOTALL)
    return re.sub(r'<img src="(?:docs/)?([\w-]+\.png)"', r'<img src="\1"', html)


def by_module(found: list[Idea]) -> dict[str, list[Idea]]:
    """Ideas by the module they live in."""
    modules: dict[str, list[Idea]] = defaultdict(list)
    for idea in found:
        modules[idea.class_path.rpartition(".")[0]].append(idea)
    return modules


def page_of(module: str) -> str:
    """File name of a module's page."""
    return f"{module.removeprefix('galago.').replace('.', '-')}.html"


def tree_of(module: str) -> ast.Module:
    """A module's source, parsed; nothing is imported."""
    return ast.parse((SOURCE / (module.replace(".", "/") + ".py")).read_text())


def index(found: dict[str, list[Idea]]) -> str:
    """The table of everything there is."""
    rows = "".join(
        f'<tr><td><a href="{page_of(module)}">{escape(idea.name)}</a></td><td>{idea.kind}</td>'
        f"<td>{inline(idea.summary)}</td><td>{paper(idea.paper)}</td></tr>\n"
        for module, members in found.items()
        for idea in members
    )
    return (
        "<h1>Methods, quantizers, data, models and probes</h1>\n<p>The same list as <code>galago methods</code>.</p>\n"
        f"<table>\n<tr><th>name<th>kind<th>what it does<th>paper</tr>\n{rows}</table>\n"
    )


def paper(number: str) -> str:
    """A link to the paper, where there is one."""
    identifier = number.removeprefix("arXiv:")
    return f'<a href="https://arxiv.org/abs/{identifier}">{number}</a>' if number else ""


def method_page(module: str, members: list[Idea]) -> str:
    """A module's docstring, then each of its ideas with its arguments."""
    tree = tree_of(module)
    title, _, page = (ast.get_docstring(tree) or module).partition("\n")
    nodes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    parts = [f"<h1>{inline(title)}</h1>\n", markdown(page)]
    for idea in members:
        parts += [f"<h2><code>{idea.class_path}</code></h2>\n", "".join(described(nodes[idea.name]))]
    return "".join(parts)


def described(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """What a class or function does, and its arguments with their defaults."""
    text, _, arguments = (ast.get_docstring(node) or "").partition("Args:\n")
    yield markdown(text)
    defaults = defaults_of(node)
    yield "<dl>\n"
    for name, meaning in arguments_of(arguments):
        given = f" = {escape(defaults[name])}" if name in defaults else ""
        yield f"<dt>{name}{given}</dt><dd>{inline(meaning)}</dd>\n"
    yield "</dl>\n"


def arguments_of(text: str) -> list[tuple[str, str]]:
    """Name and meaning of each line of an `Args:` section, up to the next section."""
    section = re.split(r"^\w+:$", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return [(name, " ".join(meaning.split())) for name, meaning in found]


def defaults_of(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """Default values of a function's, or a class's constructor's, arguments, as they are written."""
    if isinstance(node, ast.ClassDef):
        made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        return defaults_of(made[0]) if made else {}
    with_default = node.args.args[len(node.args.args) - len(node.args.defaults) :]
    return {a.arg: ast.unparse(value) for a, value in zip(with_default, node.args.defaults, strict=True)}


def inline(text: str) -> str:
    """A line of Markdown without the paragraph around it."""
    html: str = MarkdownIt("commonmark").renderInline(text)
    return html


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"
    sys.stdout.write(f"{len(build(target))} pages in {target}\n")
