"""Every example runs, in the short form that each has, and what it claims holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from weft.ops.registration import INTERPRETED

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def percent(output: str, what: str) -> float:
    return float(re.search(rf"{what} ([\d.]+)%", output)[1])


def grassmann_head(output: str, folder: Path) -> None:
    assert percent(output, "test accuracy") > 50
    assert len(re.findall(r"^  \d: [\d.]+%   nearest \d, cosine 0\.\d+$", output, re.M)) == 10


def prototype_explanation(output: str, folder: Path) -> None:
    """Prototypes decide about as well as a linear head, and the pictures are written."""
    prototypes = percent(output, "prototypes: test accuracy")
    assert prototypes > 80 and prototypes > percent(output, "linear head: test accuracy") - 10
    assert percent(output, "in feature space, by vote:") > 80
    assert len(re.findall(r"^  digit \d+: .* at [\d.]+$", output, re.M)) >= 3
    assert (folder / "out/prototype_explanation.png").stat().st_size > 10_000


def class_token_attention(output: str, folder: Path) -> None:
    """Crops of unseen parts are told apart, and the key sums are the class token's row."""
    assert percent(output, "test accuracy") > 70
    differences = re.findall(r"class token's attention ([\d.e-]+)$", output, re.M)
    assert len(differences) == 2 and max(map(float, differences)) < 1e-6
    assert (folder / "out/class_token_attention.png").stat().st_size > 50_000


def color_transfer(output: str, folder: Path) -> None:
    """The transport is solved, and each photograph takes on the colours of the other."""
    assert float(re.search(r"marginal error ([\d.e-]+) after", output)[1]) <= 1e-3
    moved = re.findall(r"channels ([\d.]+) from the other's before, ([\d.]+) after", output)
    assert len(moved) == 2 and all(float(after) < float(before) / 5 for before, after in moved)
    assert (folder / "out/color_transfer.png").stat().st_size > 100_000


def targeted_selection(output: str, folder: Path) -> None:
    """Chosen data are mostly of the target's kind, and better than as many taken at random."""
    tarot, random = (percent(output, rf"{name}: +test accuracy") for name in ("TAROT", "random"))
    assert tarot > random and tarot > 80
    assert (folder / "out/targeted_selection.png").stat().st_size > 10_000


CHECKS = (
    class_token_attention,
    color_transfer,
    grassmann_head,
    prototype_explanation,
    targeted_selection,
)
CLAIMS = {check.__name__: check for check in CHECKS}


@pytest.mark.skipif(INTERPRETED, reason="the sizes are for real machines")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    command = [sys.executable, path, "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    CLAIMS[path.stem](done.stdout, tmp_path)
