"""The README and the pages of docs/ as tests read them: fenced blocks, commands, links, headings."""

from __future__ import annotations

import re
import shlex
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from fastflower.__main__ import COMMANDS

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", REPO / "README.zh-CN.md", *sorted((REPO / "docs").rglob("*.md"))]

PROGRAMS = ("fastflower", "python", "composer", "make", "pytest", "pip", "ray", "git", "conda")
PLACEHOLDERS = {
    "DIR": "data/train",
    "FILE": "file",
    "RECIPE": "recipes/convnext.yaml",
    "SECTION": "opt",
    "KEY": "opt.lr",
}
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page and the line at which it begins."""

    page: Path
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a page: its words, without variables set in front of it and without comments."""

    place: str
    words: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, those in lists too."""
    found, opened, lines = [], None, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```(\S*)\s*$", line)
        if fence and opened is None:
            opened, lines = (number, fence[1]), []
        elif fence and opened is not None:
            text = "\n".join(lines) + "\n"
            indent = min((len(row) - len(row.lstrip()) for row in lines if row.strip()), default=0)
            text = "\n".join(row[indent:] for row in text.split("\n"))
            found.append(Block(page, opened[0], opened[1], text))
            opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"{page}: the block of line {opened} is not closed"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page: Path) -> list[Command]:
    """The commands of a page: each line of its bash blocks, and spans of code in its text that are commands."""
    found = []
    for block in blocks(page):
        if block.language == "bash":
            for line in block.text.splitlines():
                found += [
                    Command(f"{page.name}:{block.line}", words) for words in simple_commands(line) if words
                ]
    for span in _SPAN.findall(prose(page)):
        if is_command(span):
            found.append(Command(f"{page.name}: {span}", simple_commands(span)[0]))
    return found


def simple_commands(line: str) -> list[tuple[str, ...]]:
    """The commands of a line of shell that && joins, with placeholders replaced."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(PLACEHOLDERS.get(word, word))
    result = []
    for words in parts:
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        result.append(tuple(words))
    return result


def is_command(span: str) -> bool:
    """True for code in a text that is a whole command, and no pattern such as `python -m fastflower.<command>`."""
    words = span.split()
    if len(words) < 2 or "..." in span or "<" in span or span.endswith("."):
        return False
    if words[0] == "fastflower" and len(words) == 2 and words[1] in COMMANDS:
        return False  # a command's name alone
    if words[0] in COMMANDS:  # in tables that say once how each command begins
        return any("=" in word or word.startswith("recipes/") for word in words[1:])
    return words[0] in PROGRAMS


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures, without those to other sites."""
    text = _SPAN.sub("", prose(page))
    return [target for target in _LINK.findall(text) if "://" not in target]


def headings(page: Path) -> list[str]:
    """The headings of a page, without their marks."""
    return re.findall(r"^#+ +(.+?)\s*$", prose(page), flags=re.M)


def github_anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    kept = "".join(char for char in heading.lower() if char.isalnum() or char in " -_")
    return kept.replace(" ", "-")


def mkdocs_anchor(heading: str) -> str:
    """The anchor that MkDocs, by Python-Markdown, gives to a heading."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
