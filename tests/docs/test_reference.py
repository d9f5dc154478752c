"""Pages that quote the source: the key reference, messages, licences, and figures that a page computes."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastflower.recipe import explanation, load
from support import pages

DOCS = pages.REPO / "docs"
ANYTHING = "…"  # what a message puts there


def source_texts(path: Path) -> Iterator[str]:
    """The texts of a Python file, with ANYTHING where an f-string puts a value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else ANYTHING for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def quoted_messages() -> list[str]:
    """The messages that the page about faults quotes: its paragraphs of bold code."""
    return re.findall(
        r"^\*\*`(.+)`\*\*$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.M
    )


def test_every_quoted_message_is_in_the_source() -> None:
    texts = [
        text
        for folder in ("fastflower", "code")
        for path in (pages.REPO / folder).rglob("*.py")
        for text in source_texts(path)
    ]
    texts.append((pages.REPO / "scripts/setup.sh").read_text(encoding="utf-8"))
    messages = quoted_messages()
    assert len(messages) > 30 and len(messages) == len(set(messages))
    for message in messages:
        parts = [part.strip() for part in message.split(ANYTHING) if part.strip(" ;:,.=()")]
        pattern = re.compile(".*?".join(map(re.escape, parts)), re.S)
        likely = [text for text in texts if max(parts, key=len) in text]
        assert any(map(pattern.search, likely)), f"no source has: {message}"


def test_the_key_reference_is_that_of_the_schema() -> None:
    command = "python -m fastflower.explain --format md > docs/keys.md"
    text = (DOCS / "keys.md").read_text(encoding="utf-8")
    assert text == explanation.markdown() + "\n", f"keys have changed; run {command}"


def test_the_licences_are_those_of_the_weights_that_recipes_name() -> None:
    import timm

    text = (DOCS / "licences.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+?) \|", text, flags=re.M))
    needed = set()
    for path in (pages.REPO / "recipes").glob("*.yaml"):
        recipe = load(str(path))
        if recipe.model.pretrained:
            needed.add(recipe.model.backbone)
    assert needed <= set(rows)
    for name, licence in rows.items():
        said = licence.partition(":")[0].lower().replace(" ", "-")
        assert said == timm.get_pretrained_cfg(name).license, name


@pytest.mark.parametrize(
    "page", [page for page in pages.PAGES if "```text" in page.read_text(encoding="utf-8")]
)
def test_a_computed_table_is_what_its_code_prints(page: Path) -> None:
    found = pages.blocks(page)
    for code, output in zip(found, found[1:], strict=False):
        if code.language == "python" and output.language == "text":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code.text, f"{page.name}:{code.line}", "exec"), {})
            assert printed.getvalue() == output.text
