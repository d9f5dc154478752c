"""Links, anchors and the navigation of the pages: each leads to something, on GitHub and in the site of MkDocs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from support import pages

DOCS = pages.REPO / "docs"


def nav_files(nav: list[object]) -> list[str]:
    """The files that a navigation names, in order."""
    found: list[str] = []
    for entry in nav:
        assert isinstance(entry, dict)
        for target in entry.values():
            found += nav_files(target) if isinstance(target, list) else [target]
    return found


@pytest.mark.parametrize(
    "page",
    [*pages.PAGES, pages.REPO / "CONTRIBUTING.md", pages.REPO / "ARCHITECTURE.md"],
    ids=lambda page: str(page.relative_to(pages.REPO)),
)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: no such file"
        if page.is_relative_to(DOCS):
            assert file.is_relative_to(DOCS), f"{target} is outside of docs/, where a site has nothing"
        if anchor:
            titles = pages.headings(file)
            assert anchor in map(pages.github_anchor, titles), f"{target}: no such heading"
            assert anchor in map(pages.mkdocs_anchor, titles), (
                f"{target}: MkDocs names this heading otherwise"
            )


def test_the_site_has_every_page_once() -> None:
    site = yaml.safe_load((pages.REPO / "mkdocs.yml").read_text(encoding="utf-8"))
    files = nav_files(site["nav"])
    assert len(files) == len(set(files))
    assert set(files) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert site["strict"] is True


def test_every_page_can_be_reached_and_has_one_title() -> None:
    reached = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in (pages.REPO / "README.md", DOCS / "index.md", DOCS / "zh/index.md")
        for target in pages.links(page)
    }
    for page in DOCS.rglob("*.md"):
        assert page in reached or page == DOCS / "index.md", page
        text = pages.prose(page)
        assert text.startswith("# ") and text.count("\n# ") == 0, page


def test_both_languages_have_the_same_commands_and_links() -> None:
    pairs = [
        (pages.REPO / "README.md", pages.REPO / "README.zh-CN.md"),
        (DOCS / "own_photographs.md", DOCS / "zh/own_photographs.md"),
        (DOCS / "contest.md", DOCS / "zh/contest.md"),
    ]
    for english, chinese in pairs:
        of_blocks = [
            [
                words
                for block in pages.blocks(page)
                if block.language == "bash"
                for line in block.text.splitlines()
                for words in pages.simple_commands(line)
            ]
            for page in (english, chinese)
        ]
        assert of_blocks[0] == of_blocks[1], chinese.name
        assert len(pages.headings(english)) == len(pages.headings(chinese)), chinese.name
