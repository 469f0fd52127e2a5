"""The README is true: its examples run, its table has every op, its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from peers import import_timm, import_transformers

import weft
from weft.ops.cases import discover
from weft.ops.registration import INTERPRETED

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.skipif(INTERPRETED, reason="the sizes are for real machines")
def test_examples_run():
    scope: dict = {}
    for block in blocks(of_packages=False):
        exec(block, scope)
    assert scope["logits"].shape == (32, 10)


@pytest.mark.skipif(INTERPRETED, reason="the sizes are for real machines")
def test_examples_of_packages_run():
    import_timm()
    import_transformers()
    scope = {"weft": weft}
    for block in blocks(of_packages=True):
        exec(block, scope)
    with torch.no_grad():
        assert scope["model"](torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def blocks(of_packages: bool) -> list[str]:
    """The examples, apart from those that import a package that weft does not need."""
    found = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    chosen = [b for b in found if bool(re.search("(timm|transformers)\\b.*\n", b)) == of_packages]
    assert chosen
    return chosen


def test_table_has_every_op():
    listed = set(re.findall(r"^\| `weft\.(\w+)` \|", TEXT, re.M))
    assert listed == {cases.name for _, cases in discover()}


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([\w./]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"
