"""The report as a page: what it shows, what it leaves out, what it refuses."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galago.deploy.report.report import write_report
from galago.errors import UserError

Write = Callable[..., Path]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; notes tags that close what is not open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.crossed: list[str] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def text_of(page: Path) -> str:
    """What a reader sees, on one line and with plain spaces."""
    shown = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", shown)).replace("\u00a0", " ").replace("\u2060", "").split())


def titles(page: Path) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page.read_text())


def put(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def test_a_full_run_shows_every_plot_and_table(write_run: Write) -> None:
    page = write_report(write_run("student"), write_run("teacher", bits=None))
    assert titles(page) == [
        "Accuracy against size",
        "Accuracy against latency",
        "Time for one image",
        "Time for a batch of 32",
        "Reliability: float, before",
        "Reliability: resnet20, after",
        "Error against coverage",
        "Errors by corruption",
        "Bits of each layer",
        "Rounding error of each layer",
        "Each layer quantized alone",
        "Each layer alone left in float",
        "Losses while training",
        "Accuracy while training",
    ]
    shown = text_of(page)
    for expected in ("What shrinking cost", "OpenVINO against integer network", "galago ship --config", "torch 2.15.0"):
        assert expected in shown
    assert "galago measure" not in shown


def test_the_report_lies_in_the_run_folder_and_leaves_no_half_file(write_run: Write) -> None:
    run = write_run("student")
    assert write_report(run) == run / "report.html"
    assert not list(run.glob("*.part")) + list(run.glob(".*.part"))


def test_the_headline_says_accuracy_size_speed_and_proof(write_run: Write) -> None:
    shown = text_of(write_report(write_run("student"), write_run("teacher", bits=None)))
    accuracy = r"resnet20, 4-bit: 89\.2 % \(float 90\.3 %\), 0\.19 MB \(5\.9 × smaller\), 2\.4 × faster in OpenVINO;"
    assert re.search(accuracy + " both files proved equal to the trained model", shown)


@pytest.mark.parametrize(
    ("missing", "heading", "command"),
    [
        ("latency.json", "Time for one image", "galago measure --latency true --run"),
        ("layers.json", "Bits of each layer", "galago measure --run"),
        ("predictions", "Reliability: trained model", "galago measure --run"),
        ("metrics.json", "Accuracy against size", "galago measure --run"),
        ("log.jsonl", "Losses while training", "galago train --config"),
        ("run.json", "", "galago train --config"),
        ("verify.json", "", "galago export --run"),
    ],
)
def test_what_is_missing_is_replaced_by_the_command_that_makes_it(
    write_run: Write, missing: str, heading: str, command: str
) -> None:
    run = write_run("student")
    assert command not in text_of(write_report(run))
    for file in [run / missing] if missing != "predictions" else (run / missing).iterdir():
        file.unlink()
    page = write_report(run)
    assert heading not in titles(page)
    assert command in text_of(page)


def test_an_exported_but_unverified_file_asks_for_verify(write_run: Write) -> None:
    run = write_run("student")
    (run / "verify.json").unlink()
    (run / "model.onnx").write_bytes(b"")
    shown = text_of(write_report(run))
    assert "its files are not verified yet" in shown
    assert f"galago verify --run {run}" in shown


def test_a_run_with_nothing_but_a_recipe_still_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 3\n")
    assert "not measured yet" in text_of(write_report(tmp_path))


def test_a_folder_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        write_report(tmp_path)


def test_a_file_within_a_twentieth_of_float_is_called_as_fast(write_run: Write) -> None:
    run = write_run("student")
    latency = json.loads((run / "latency.json").read_text())
    for row in latency["rows"]:
        row["ratio"] = 1.04
    put(run, "latency.json", latency)
    assert "smaller), as fast as float in ONNX Runtime; both files" in text_of(write_report(run))
    for row in latency["rows"]:
        row["ratio"] = 0.8
    put(run, "latency.json", latency)
    assert "smaller), 1.2 × slower in ONNX Runtime; both files" in text_of(write_report(run))


def test_a_failed_check_is_said_in_the_headline_and_names_the_layer(write_run: Write) -> None:
    run = write_run("student")
    outcome = json.loads((run / "verify.json").read_text())
    outcome["passed"] = outcome["openvino"]["passed"] = False
    outcome["openvino"]["first_diverging"] = "layer2.0.conv1.stream"
    put(run, "verify.json", outcome)
    shown = text_of(write_report(run))
    assert "the OpenVINO file did NOT prove equal" in shown
    assert re.search(r"OpenVINO against integer network ✗ differs .*? layer2\.0\.conv1\.stream", shown)
    assert "both files proved" not in shown


def test_the_page_needs_nothing_but_itself(write_run: Write) -> None:
    page = write_report(write_run("student"), write_run("teacher", bits=None))
    source = page.read_text()
    assert "http:" not in source
    assert "https:" not in source
    assert "url(" not in source
    assert "@import" not in source
    parsed = Page(source)
    assert not {"script", "img", "link", "iframe", "object", "a", "base", "form"} & {tag for tag, _ in parsed.tags}
    assert not {name for _, given in parsed.tags for name in given} & {"src", "href", "xlink:href", "srcset", "style"}
    assert "default-src 'none'" in source


def test_every_tag_is_closed_in_its_place(write_run: Write) -> None:
    parsed = Page(write_report(write_run("student"), write_run("teacher", bits=None)).read_text())
    assert parsed.crossed == []
    assert parsed.open == []


def test_no_mark_lies_outside_its_plot_or_at_no_number(write_run: Write) -> None:
    source = write_report(write_run("student"), write_run("teacher", bits=None)).read_text()
    assert "nan" not in re.sub(r"<style>.*?</style>", "", source, flags=re.DOTALL).lower().split()
    for drawing in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing).groups())
        places = re.findall(r' (?:x|x1|x2|cx)="(\S+?)"', drawing)
        levels = re.findall(r' (?:y|y1|y2|cy)="(\S+?)"', drawing)
        assert all(0 <= float(place) <= width for place in places)
        assert all(0 <= float(level) <= height for level in levels)


def test_hostile_names_are_text_wherever_they_stand(write_run: Write) -> None:
    run = write_run("student")
    (run / "recipe.yaml").write_text(json.dumps({"model": {"class_path": HOSTILE}, HOSTILE: HOSTILE}))
    put(run, "run.json", {"command": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}})
    for name in ("layers.json", "latency.json", "verify.json", "sensitivity.json"):
        put(run, name, poisoned(json.loads((run / name).read_text())))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["model"][HOSTILE] = 1.0
    put(run, "metrics.json", metrics)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (run / "log.jsonl").write_text("\n".join(json.dumps(line | {HOSTILE: 1.0}) for line in log))
    parsed = Page(write_report(run, run).read_text())
    assert not {"script", "img"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, given in parsed.tags for name in given)
    assert parsed.crossed == []
    assert "".join(parsed.words).count("<script>") > 30


def poisoned(content: Any) -> Any:
    """The same data with every text but the keys that choose an engine or a precision replaced."""
    if isinstance(content, dict):
        return {k: v if k in ("engine", "precision") else poisoned(v) for k, v in content.items()}
    if isinstance(content, list):
        return [poisoned(value) for value in content]
    return HOSTILE if isinstance(content, str) or content is None else content


def test_a_run_folder_with_a_hostile_name_is_escaped(tmp_path: Path, write_run: Write) -> None:
    run = write_run("<b onclick=x>")
    (run / "latency.json").unlink()
    parsed = Page(write_report(run).read_text())
    assert "b" not in {tag for tag, _ in parsed.tags}


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "metrics.json",
        "latency.json",
        "layers.json",
        "verify.json",
        "architecture.json",
        "sensitivity.json",
    ],
)
@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"], ids=["cut", "bytes", "deep", "long"]
)
def test_a_damaged_json_file_is_named(write_run: Write, name: str, content: bytes) -> None:
    run = write_run("student")
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        write_report(run)


@pytest.mark.parametrize(
    "name", ["metrics.json", "latency.json", "layers.json", "verify.json", "run.json", "sensitivity.json"]
)
@pytest.mark.parametrize(
    "content",
    [
        {},
        {"rows": [None, 3, {"engine": []}], "model": 7, "onnx": {"accuracy": "high"}, "passed": "yes", "integer": []},
        {"rows": {"a": 1}, "integer": {"layers": [1, {}], "agreement": float("nan")}, "versions": [1]},
        {
            "rows": [{"median_ms": 1e308, "batch": 10**400, "engine": "x"}, {"median_ms": -1}],
            "model": {"accuracy": 1e9},
        },
    ],
    ids=["empty", "wrong types", "wrong shapes", "absurd numbers"],
)
def test_unexpected_content_never_breaks_the_page(write_run: Write, name: str, content: dict[str, Any]) -> None:
    run, other = write_run("student"), write_run("teacher", bits=None)
    put(run, name, [content] if name == "layers.json" else content)
    assert Page(write_report(run, other).read_text()).crossed == []


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "latency.json", "verify.json", "sensitivity.json"])
def test_a_list_where_a_mapping_belongs_is_named(write_run: Write, name: str) -> None:
    run = write_run("student")
    put(run, name, [1])
    with pytest.raises(UserError, match=f"{name} should hold a mapping"):
        write_report(run)


@pytest.mark.parametrize("content", ["a: [", "- 1", "a: 2024-13-45", "[" * 5000], ids=["cut", "list", "date", "deep"])
def test_a_damaged_recipe_is_named(write_run: Write, content: str) -> None:
    run = write_run("student")
    (run / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        write_report(run)


def test_files_far_larger_than_any_run_writes_are_refused(write_run: Write) -> None:
    run = write_run("student")
    with (run / "metrics.json").open("wb") as file:
        file.truncate(20_000_000)
    with pytest.raises(UserError, match=r"metrics\.json has 20 MB"):
        write_report(run)


def test_a_last_line_cut_off_by_a_crash_is_left_out_and_one_before_it_is_named(write_run: Write) -> None:
    run = write_run("student")
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join([*lines, '{"kind": "st']))
    assert "Losses while training" in titles(write_report(run))
    (run / "log.jsonl").write_text("\n".join([lines[0], '{"kind": "st', *lines[1:]]))
    with pytest.raises(UserError, match=r"log\.jsonl is damaged in line 2"):
        write_report(run)


def test_a_large_network_after_a_long_training_stays_small(write_run: Write) -> None:
    run = write_run("student", layers=900)
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log * 20)
    page = write_report(run, write_run("teacher", bits=None))
    assert page.stat().st_size < 1_500_000
    assert "Only the first 400 layers are shown" in text_of(page)


def test_a_network_that_diverged_has_no_reliability_diagram_but_a_report(write_run: Write) -> None:
    run = write_run("student")
    for path in (run / "predictions").iterdir():
        np.savez(path, output=np.full((4, 3), np.nan, np.float32), target=np.zeros(4, np.int64))
    assert not [title for title in titles(write_report(run)) if title.startswith("Reliability")]


def test_errors_are_drawn_against_coverage_by_confidence_or_by_reservation(write_run: Write) -> None:
    run, other = write_run("student"), write_run("teacher", bits=None)
    area = r"Area under the curve: trained model: 0\.\d+ \(by confidence\); ONNX file: 0\.\d+ \(by confidence\)\."
    assert re.search(area, text_of(write_report(run)))
    draws = np.random.default_rng(0)
    for path in (run / "predictions").iterdir():
        output, reservation = draws.standard_normal((1000, 11)).astype(np.float32), draws.random(1000)
        np.savez(path, output=output, target=draws.integers(0, 10, 1000), reservation=reservation)
    area = r"resnet20, after: 0\.\d+ \(by reservation\); float, before: 0\.\d+ \(by confidence\)\."
    assert re.search(area, text_of(write_report(run, other)))


def test_an_equal_architecture_lends_its_float_time_to_a_run_that_was_not_timed(write_run: Write) -> None:
    run, other = write_run("student"), write_run("teacher", bits=None)
    assert "float: ONNX Runtime, fp32: 1.21 ms" in write_report(run, other).read_text()
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["model"]["macs"] *= 2
    put(other, "metrics.json", metrics)
    assert "float: ONNX Runtime, fp32" not in write_report(run, other).read_text()


MUTANTS = (
    None,
    True,
    -1,
    0,
    1e-320,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    10**400,
    "",
    "x" * 5000,
    HOSTILE,
    [],
    {},
)


def mutated(content: Any, draws: np.random.Generator, share: float) -> Any:
    """The same data with some values replaced by what no run writes."""
    if draws.random() < share:
        return MUTANTS[draws.integers(len(MUTANTS))]
    if isinstance(content, dict):
        return {key: mutated(value, draws, share) for key, value in content.items()}
    if isinstance(content, list):
        return [mutated(value, draws, share) for value in content]
    return content


@pytest.mark.parametrize("seed", range(12))
def test_no_mutation_of_a_runs_files_ends_in_a_traceback(write_run: Write, seed: int) -> None:
    draws = np.random.default_rng(seed)
    folders = [write_run("student", layers=6), write_run("teacher", bits=None, layers=6)]
    for folder in folders:
        for path in folder.glob("*.json"):
            share = float(draws.choice([0.0, 0.05, 0.3]))
            content = json.loads(path.read_text())
            path.write_text(
                json.dumps({key: mutated(value, draws, share) for key, value in content.items()})
                if isinstance(content, dict)
                else json.dumps(mutated(content, draws, share))
            )
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[::9]]
        changed = [json.dumps(mutated(line, draws, 0.05)) for line in lines]
        (folder / "log.jsonl").write_text("\n".join(changed))
    try:
        parsed = Page(write_report(*folders).read_text())
    except UserError:
        return
    assert parsed.crossed == []
    assert not {"script", "img"} & {tag for tag, _ in parsed.tags}


@pytest.mark.parametrize(
    ("model", "base", "name"),
    [
        ({"class_path": "galago.models.tiny.tiny"}, "galago.models.tiny.Tiny", "tiny"),
        ({"class_path": "galago.run.load", "init_args": {"run": "a"}}, "galago.models.resnet.resnet32", "resnet32"),
        ({"class_path": "timm.create_model", "init_args": {"model_name": "levit_128s"}}, "", "levit_128s"),
        (None, "", "student"),
    ],
)
def test_the_network_is_called_what_its_recipe_calls_it(
    write_run: Write, model: dict[str, Any] | None, base: str, name: str
) -> None:
    run = write_run("student")
    (run / "recipe.yaml").write_text(json.dumps({"model": model}))
    put(run, "architecture.json", {"model": {"class_path": base}})
    assert text_of(write_report(run)).split("Galago report ")[-1].startswith(f"{name}, 4-bit: ")
