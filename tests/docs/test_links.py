"""Every link of every document leads somewhere, and every path that a document names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, anchors, links, prose, tracked

TRACKED = set(tracked())
NAMED = re.compile(r"`((?:trainer|pool|router|tests|deploy|docs|ds_configs)/[\w./*-]+)`")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document: str) -> None:
    broken = []
    for link in links(document):
        if "://" in link:
            if not re.fullmatch(r"https?://[\w.-]+\.\w+(/[\w./%#-]*)?", link):
                broken.append(f"{link}: not the form of an address")
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        if not (target.is_dir() or str(target.relative_to(ROOT)) in TRACKED):
            broken.append(f"{link}: does not exist, or git ignores it")
        elif anchor and anchor not in anchors(str(target.relative_to(ROOT))):
            broken.append(f"{link}: has no such anchor")
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths(document: str) -> None:
    named = NAMED.findall(prose(document))
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/")))] == []


def test_the_front_page_is_short() -> None:
    lines = Path(ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
