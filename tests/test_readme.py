"""The README is true: its examples run, its table has every op, its links lead somewhere."""

import re
from pathlib import Path

import pytest

from weft.ops.cases import discover
from weft.ops.registration import INTERPRETED

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.skipif(INTERPRETED, reason="the sizes are for real machines")
def test_examples_run():
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        exec(block, scope)
    assert scope["logits"].shape == (32, 10)


def test_table_has_every_op():
    listed = set(re.findall(r"^\| `weft\.(\w+)` \|", TEXT, re.M))
    assert listed == {cases.name for _, cases in discover()}


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([\w./]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"
