"""``pytest benchmarks``: every workload of every family, through pytest-benchmark.

The harness times all providers of a case in turns; each is then one benchmark of pytest-benchmark,
in one group, so that its tables, comparisons and JSON work. ``--quick`` runs the small workloads.
"""

import pytest
import torch

from weft.benchmarks.harness import Row, Settings, cases_of, run_case
from weft.benchmarks.machine import measure_limits
from weft.benchmarks.measure import PASSES, Case
from weft.benchmarks.providers import peers_of


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small workloads, short runs")


def settings_of(config) -> Settings:
    quick = config.getoption("--quick")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Settings(device, quick=quick, seconds=0.3 if quick else 1.5)


def pytest_generate_tests(metafunc):
    """``test_<family>`` becomes one test per case, pass and provider."""
    if "measured" not in metafunc.fixturenames:
        return
    family = metafunc.function.__name__.removeprefix("test_")
    parameters = []
    for case in cases_of(settings_of(metafunc.config), family):
        peers = [peer.name for peer in peers_of(family) if peer.op == case.cases.name]
        for pass_ in PASSES if case.cases.differentiable else PASSES[:1]:
            for provider in ("weft", "pytorch", "compile", *peers):
                name = f"{case.name} {pass_} {provider}".replace(" ", "-")
                parameters.append(pytest.param((case, pass_, provider), id=name))
    metafunc.parametrize("measured", parameters, indirect=True)


@pytest.fixture(scope="session")
def limits(pytestconfig):
    settings = settings_of(pytestconfig)
    return measure_limits(settings.device, list(settings.dtypes))


@pytest.fixture(scope="session")
def rows_of(pytestconfig, limits):
    """The rows of a case, measured when the first of them is asked for."""
    known: dict[str, list[Row]] = {}

    def rows(case: Case) -> list[Row]:
        if case.name not in known:
            known[case.name] = run_case(case, limits, settings_of(pytestconfig))
        return known[case.name]

    return rows


@pytest.fixture
def measured(request, benchmark, rows_of):
    """Call it to report one row; a wrong result of weft fails, what cannot run here is skipped."""
    case, pass_, provider = request.param
    benchmark.group = f"{case.name} {pass_}"

    def report() -> None:
        row = next(r for r in rows_of(case) if (r.pass_, r.provider) == (pass_, provider))
        if row.status != "ok":
            message = f"{provider}: {row.status}: {row.note}"
            (pytest.fail if provider == "weft" else pytest.skip)(message)
        record(benchmark, row)

    return report


def record(benchmark, row: Row) -> None:
    """Gives pytest-benchmark the times that were taken in turns: it would time one at a time."""
    stats = benchmark._make_stats(iterations=1)
    for seconds in row.times:
        stats.update(seconds)
    benchmark.extra_info |= {
        "error": row.error,
        "ratio_to_fastest_other": row.ratio,
        "fraction_of_limit": row.fraction,
        "peak_extra_bytes": row.memory,
        "implementation": row.note,
    }
