"""``python -m weft``: what it prints, what it writes, and how it fails."""

import json
import subprocess
import sys

import pytest
import torch

import weft
from weft.__main__ import main
from weft.benchmarks import measure, memory, providers
from weft.benchmarks.harness import Settings, cases_of, check, run_case
from weft.benchmarks.machine import Limits
from weft.benchmarks.providers import Peer, Provider
from weft.cli import console as terminal
from weft.cli import digits
from weft.ops.registration import INTERPRETED, registry

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the command line is for real machines")
LIMITS = Limits(1e10, {torch.float32: 1e11})


def quick_case():
    """Of an op with gradients."""
    return next(cases_of(Settings(dtypes=(torch.float32,), quick=True), "subspace_logits"))


@pytest.mark.parametrize("rich", [True, False])
def test_status_names_every_op_and_implementation(capsys, monkeypatch, rich):
    if rich:
        pytest.importorskip("rich")
    monkeypatch.setattr(terminal, "HAS_RICH", rich)
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "Native libraries" in shown
    for op in registry.values():
        assert op.name in shown.replace("\n", "")
    assert "no: " in shown  # with the reason


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "weft", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "bench" in done.stdout and "demo" in done.stdout


def test_bench_quick_writes_results(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    short = Settings(dtypes=(torch.float32,), quick=True, seconds=0.01, compiled=False)
    monkeypatch.setattr("weft.cli.bench.Settings", lambda *_, **__: short)
    monkeypatch.setattr("weft.benchmarks.harness.measure_limits", lambda *_: LIMITS)
    files = ["--json", str(tmp_path / "deep/r.json"), "--plot", str(tmp_path / "plots")]
    code = main(["bench", "subspace_logits", "--quick", "--device", "cpu", *files])
    assert code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "deep/r.json").read_text())
    assert {"device", "torch", "date"} <= report["machine"].keys()
    assert report["limits"]["matrix_gflop_per_s"]["float32"] == 100
    rows = {(r["op"], r["pass"], r["provider"]): r for r in report["rows"]}
    for provider in ("weft", "pytorch"):
        row = rows["subspace_logits", "both", provider]
        assert row["status"] == "ok" and 0 < row["min"] <= row["median"]
        assert row["error"] < 1e-4 and row["fraction"] > 0 and row["ratio"] > 0
        assert len(row["times"]) >= measure.MINIMUM_ROUNDS
    assert (tmp_path / "plots/subspace_logits.png").stat().st_size > 10_000
    assert "subspace_logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["bench", "nothing"], 2, "no family or op 'nothing'; there are: "),
        (["bench", "--device", "cuda"], 2, "torch finds no CUDA device"),
    ],
)
def test_errors_are_one_sentence(capsys, monkeypatch, arguments, code, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_bad_arguments_exit_with_2():
    for arguments in (["bench", "--dtype", "int8"], ["nothing"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


@pytest.mark.parametrize(
    "arguments, absent, command",
    [
        (["demo"], ("sklearn", "matplotlib"), "pip install scikit-learn matplotlib"),
        (["bench", "--plot", "x"], ("matplotlib",), "pip install matplotlib"),
    ],
)
def test_missing_extras_are_named(capsys, monkeypatch, arguments, absent, command):
    find = terminal.find_spec
    monkeypatch.setattr(terminal, "find_spec", lambda m: None if m in absent else find(m))
    assert main(arguments) == 2
    assert command in capsys.readouterr().err


def test_wrong_results_are_reported_and_not_timed(monkeypatch):
    case = quick_case()
    listed = [
        Provider("weft", case.cases.function),
        Provider("pytorch", case.cases.plain),
        Provider("off", lambda *a, **o: case.cases.plain(*a, **o) * 1.001),
        Provider("raises", lambda *a, **o: [][0]),
        Provider("detached", lambda *a, **o: case.cases.plain(*a, **o).detach()),
    ]
    monkeypatch.setattr("weft.benchmarks.harness.providers_of", lambda *_: listed)
    rows = run_case(case, LIMITS, Settings(seconds=0, memory=False))
    status = {(row.provider, row.pass_): row.status for row in rows}
    for pass_ in case.passes:
        assert status["weft", pass_] == status["pytorch", pass_] == "ok"
        assert status["off", pass_] == "wrong" and status["raises", pass_] == "failed"
    assert status["detached", "forward"] == "ok" and status["detached", "both"] == "failed"
    assert all(not row.times and row.note for row in rows if row.status != "ok")


def test_the_implementation_that_ran_is_named():
    case = quick_case()
    with weft.use("reference"):
        checked = check(case, [Provider("weft", case.cases.function)])
    assert checked["weft"][:2] == ("ok", "reference")


def test_missing_peers_are_named(monkeypatch):
    case = quick_case()

    def refuses():
        raise NotImplementedError("takes no gamma")

    peers = [
        Peer("absent", case.cases.name, "no_such_module", "no-such-package", dict),
        Peer("narrow", case.cases.name, "torch", "torch", refuses),
        Peer("other", "another_op", "torch", "torch", dict),
    ]
    monkeypatch.setattr(providers, "peers_of", lambda family: peers)
    found = {p.name: p for p in providers.providers_of("pairwise", case.cases)}
    assert list(found) == ["weft", "pytorch", "compile", "absent", "narrow"]
    assert found["absent"].reason == "not installed: pip install no-such-package"
    assert found["narrow"].reason == "takes no gamma" and found["narrow"].function is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_counts_what_any_allocator_gives():
    case = quick_case()
    size = 64 << 20

    def allocates(*_, **__):
        return bytearray(size).count(1)

    peak, _ = memory._peak_here(case, allocates, "forward", None)
    assert 0.95 * size < peak < 1.2 * size  # the kernel counts pages in batches, per thread


def test_memory_of_a_fresh_process():
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    case = quick_case()
    peaks = memory.peak_extra(case, "pytorch", case.cases.plain)
    assert set(peaks) == set(case.passes)
    gradients = sum(a.numel() for a in case.args) * 4
    assert gradients <= peaks["both"] < 64 << 20


def test_roofline():
    assert LIMITS.seconds(1e11, 1, torch.float32) == 1
    assert LIMITS.seconds(1, 2e10, torch.float32) == 2


def test_intra_class_angles():
    features = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [1, 1], [5, 5]])
    by_class = digits.intra_class_angles(features, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(by_class[0].sort().values, torch.tensor([90.0, 90, 180]).double())
    assert by_class[1].shape == (1,) and float(by_class[1]) < 1e-5


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "weft_demo.png").stat().st_size > 10_000
    assert "feature variability" in capsys.readouterr().out


def test_results_without_rounding_must_be_exact():
    assert measure.is_wrong(0.001, 0.0, torch.uint8)
    assert not measure.is_wrong(0.0, 0.0, torch.uint8)
    assert not measure.is_wrong(1e-7, 0.0, torch.float32)
