"""The documentation does what it says: snippets run and print what stands below them, and commands exist.

The ```python blocks of a page run in order, in one namespace and an empty folder. Where a ```text block follows one
directly, it is what the snippet prints, and is compared with it; with UNDRIFT_REWRITE_DOCS=1 it is written anew first.
A line of a ```bash block must name a target of the Makefile, a command of undrift with flags that it takes, or one of a
few ordinary tools.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from undrift.cli.arguments import parse
from undrift.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = {"git", "cd", "pip", "python"}


@dataclass(frozen=True)
class Block:
    language: str
    line: int
    text: str
    end: int


def blocks(page: Path) -> list[Block]:
    """Fenced code of a page, with the number of its first line."""
    out, lines = [], page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        if match := re.fullmatch(r"(`{3,})([\w-]+)", lines[i]):
            end = lines.index(match[1], i + 1)
            out.append(Block(match[2], i + 2, "\n".join(lines[i + 1 : end]) + "\n", end))
            i = end
        i += 1
    return out


def follows(page: Path, first: Block, second: Block) -> bool:
    """Whether nothing but empty lines stands between two blocks."""
    return not "".join(page.read_text(encoding="utf-8").splitlines()[first.end + 1 : second.line - 2]).strip()


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_every_page_is_read():
    assert ROOT / "docs" / "getting-started.md" in PAGES
    assert sum(b.language == "python" for p in PAGES for b in blocks(p)) >= 20


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=name)
def test_snippets_run_and_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "snippet"}
    found, shown = blocks(page), {}
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "python":
            continue
        # Empty lines in front give tracebacks the page's own line numbers.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            exec(code, namespace)
        if after is not None and after.language == "text" and follows(page, block, after):
            shown[after] = printed.getvalue().rstrip()
    if os.environ.get("UNDRIFT_REWRITE_DOCS"):
        lines = page.read_text(encoding="utf-8").splitlines()
        for block in reversed(shown):
            lines[block.line - 1 : block.end] = shown[block].split("\n")
        page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for block in shown:
        assert shown[block] == block.text.rstrip(), f"{name(page)}, line {block.line}"


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """Command lines of a page's ```bash blocks, continued lines joined, with their line numbers."""
    out = []
    for block in blocks(page):
        if block.language == "bash":
            joined = re.sub(r"\\\n\s*", " ", block.text)
            out += [(block.line, shlex.split(line, comments=True)) for line in joined.splitlines() if line.strip()]
    return out


def test_commands_exist_and_take_these_flags(tmp_path, monkeypatch):
    """Lines that call undrift are parsed; ```yaml blocks that begin with the name of a file are at hand as files."""
    monkeypatch.chdir(tmp_path)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    programs: set[str] = set()
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml" and (match := re.match(r"# (\S+\.yaml)\n", block.text)):
                (tmp_path / match[1]).write_text(block.text, encoding="utf-8")
        for line, words in commands(page):
            where = f"{name(page)}, line {line}: {' '.join(words)}"
            programs.add(words[0])
            if words[0] == "make":
                assert words[1] in targets, where
            elif words[0] == "undrift":
                assert words[1] in COMMANDS, where
                parse(COMMANDS[words[1]], words[2:])
            else:
                assert words[0] in TOOLS, where
    assert {"make", "undrift"} <= programs


FAST: dict[str, list[str]] = {
    "minimal_density.py": [],
    "minimal_design.py": ["3", "100"],
    "minimal_inverse.py": ["100"],
    "minimal_learned.py": ["20"],
    "minimal_learned_sampler.py": ["20"],
    "minimal_likelihood.py": ["50"],
    "minimal_process.py": ["1000"],
    "minimal_samplers.py": ["500", "5"],
    "minimal_train.py": ["100"],
}
"""Arguments, numbers of samples or steps, with which an example takes a few seconds."""


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example, tmp_path, monkeypatch, capsys):
    """In an empty folder, with nothing but the library, in fewer than 150 lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), *FAST[example.name]])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example prints what it found"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 150
