"""Shared by all tests: the implementations that run here, and inputs surrounded by canaries."""

import contextlib

import pytest
import torch

import weft
from weft import native
from weft.ops.registration import INTERPRETED

torch.set_num_threads(2)

# "cpu:avx2" is the C++ kernel of that instruction-set level.
IMPLEMENTATIONS = ["reference", *(f"cpu:{level}" for level in native.supported_levels())]
if INTERPRETED:
    IMPLEMENTATIONS = ["triton"]


@contextlib.contextmanager
def running(implementation: str):
    """Pins an implementation, with its instruction-set level."""
    name, _, level = implementation.partition(":")
    with weft.use(name), native.use_level(level) if level else contextlib.nullcontext():
        yield


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = pytest.mark.skip(reason="long leg: make test-all")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
