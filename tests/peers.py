"""The packages whose models tests compare with; a test skips where one is not installed."""

from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from weft.ops.registration import INTERPRETED


def import_timm() -> ModuleType:
    _prepare()
    return pytest.importorskip("timm")


def import_transformers() -> ModuleType:
    """Version 5, whose mask interface counts query positions from an offset."""
    _prepare()
    return pytest.importorskip("transformers", minversion="5")


def _prepare() -> None:
    """Both packages import torchvision. Beside a torch that it was not built for, its library does
    not load and its import fails on two ops that it gives fake functions; no model here runs them.
    """
    if INTERPRETED:
        pytest.skip("whole models are not for an interpreter", allow_module_level=True)
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", schema)
