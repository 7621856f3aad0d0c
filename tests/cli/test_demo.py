"""The main job, at a scale of seconds: the report is there, complete, and opens without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from undrift.cli import main
from undrift.report.comparison import number

PROCESSES = ("VP", "CLD", "PSLD", "MALDA", "FlowMatching")


class Document(HTMLParser):
    """What a report is made of."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        given = dict(attrs)
        if tag == "img":
            self.images.append(given)
        self.loads += [given[k] for k in ("src", "href", "srcset", "data", "poster") if k in given]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "td" in self._open or "th" in self._open:
            self.cells.append(data)
        if "h2" in self._open:
            self.headings.append(data)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["demo", "--fast", "--progress", "false", "--out", str(out)]) == 0
    return out


def test_the_report_is_one_file_that_opens_without_a_network(demo):
    text = (demo / "report.html").read_text(encoding="utf-8")
    document = Document(text)
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in document.loads)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", text)
    assert {"html", "main", "h1", "nav", "caption", "figcaption"} <= set(document.tags)


def test_the_report_shows_pictures_with_words_and_the_table(demo):
    document = Document((demo / "report.html").read_text(encoding="utf-8"))
    assert document.headings == [
        *("Quality against network calls", "Samples", "Processes", "Walks from noise to data", "Training", "Reproduce"),
    ]
    # comparison, six sets of samples, kernels, a walk for each process, training
    assert len(document.images) == 1 + 6 + 1 + len(PROCESSES) + 1
    assert all(len(image["alt"] or "") > 10 for image in document.images)
    rows = [json.loads(line) for line in (demo / "comparison.jsonl").read_text().splitlines()]
    assert {r["process"] for r in rows} == set(PROCESSES)
    assert len({r["sampler"] for r in rows}) >= 4
    for row in rows:
        assert number(row) in document.cells


def test_every_cell_comes_from_one_denoiser(demo):
    rows = [json.loads(line) for line in (demo / "comparison.jsonl").read_text().splitlines()]
    assert len({r["settings"]["identity"]["checkpoint"] for r in rows}) == 1


def test_a_finished_demo_is_not_overwritten_and_reported_again_on_demand(demo, capsys):
    assert main(["demo", "--fast", "--out", str(demo)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    before = (demo / "report.html").read_bytes()
    (demo / "report.html").unlink()
    assert main(["report", "--run", str(demo)]) == 0
    assert (demo / "report.html").read_bytes() == before, "a report is a function of its folder"
