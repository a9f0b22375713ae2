"""CITATION.cff, from which hosting sites make citations, names the paper as the README does."""

from __future__ import annotations

import re

import yaml

from tests.docs.markdown import ROOT


def test_citation_is_the_readme_s() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    (entry,) = re.findall(r"```bibtex\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    fields = {
        name: " ".join(value.replace("{", "").replace("}", "").split())
        for name, value in re.findall(r"^  (\w+) += \{(.+?)\},?$", entry, re.DOTALL | re.MULTILINE)
    }
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    written = {"author": " and ".join(authors)} | {key: str(paper[key]) for key in ("title", "journal", "year")}
    assert written == fields
    assert paper["url"].rsplit("/", 1)[1] == paper["journal"].rsplit(":", 1)[1]
