"""docs/reference/ is up to date with the code."""

from __future__ import annotations

import runpy

import pytest

from tests.docs.markdown import ROOT
from trainer.config.recipe import Recipe

PAGES = runpy.run_path(str(ROOT / "docs" / "reference" / "generate.py"))["PAGES"]


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_up_to_date(page: str) -> None:
    assert (ROOT / "docs" / "reference" / page).read_text() == PAGES[page](), "run `make docs`"


def test_every_key_is_described_in_a_sentence() -> None:
    sections = Recipe.model_json_schema()["$defs"].items()
    described = {
        f"{name}.{key}": field.get("description")
        for name, schema in sections
        for key, field in schema["properties"].items()
    }
    assert len(described) > 80
    assert [
        key
        for key, text in described.items()
        if not text or text[-1] != "." or not (text[0].isupper() or text[0] == "`")
    ] == []


def test_the_picture_is_what_its_script_draws() -> None:
    images = ROOT / "docs" / "images"
    overview = runpy.run_path(str(images / "make_overview.py"))["overview"]
    assert (images / "overview.svg").read_text() == overview()
