"""docs/papers.md: what it names exists."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (ROOT / "docs/papers.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| paper |")
]
named = pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])


@named
def test_row(row):
    title, objects, tests, checked_against = row
    assert title and checked_against
    names = re.findall(r"`(weft[\w.]*)`", objects)
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert callable(getattr(import_module(module), attribute)), name
    places = re.findall(r"`([\w/.]+)::(\w+)`", tests)
    assert places
    for path, function in places:
        assert f"def {function}(" in (ROOT / path).read_text(), f"{path}::{function}"
