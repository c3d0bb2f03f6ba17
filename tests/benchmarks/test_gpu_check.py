"""`benchmarks/gpu_check.py`: what it makes of parts that are right, wrong, slow or cannot run.

Some of its own parts run on the simulated device: tests/device/test_gpu_check.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ENVIRONMENT, TESTS
from support.deadline import DEADLINE_S, until

from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM
from distlm.runtime.alive import process_start
from distlm.runtime.ranks.device import accelerator

FOLDER = TESTS.parent / "benchmarks"
FAKE = """
import os, subprocess, time
from gpu.part import Outcome

def right(place):
    return Outcome({"answer": 42, "device": place.device, "empty": not list(place.folder.iterdir())})

def wrong(place):
    out = Outcome({"apart": 0.5})
    out.must(0.5 < 0.1, "apart by 0.5")
    return out

def slower(place):
    out = Outcome()
    out.goal("share", 0.5, least=0.9)
    return out

def raises(place):
    print("before", flush=True)
    raise ValueError("no such thing")

def cannot(place):
    return Outcome(skipped="not installed: faiss-gpu")

def sleeps(place):
    child = subprocess.Popen(["sleep", "1000000"])
    print("processes", os.getpid(), child.pid, flush=True)
    time.sleep(1000000)
"""


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """benchmarks/ lies on the path, as when one of them is started."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def part(name: str, limit_s: int = 120, **settings: Any) -> Any:
    return import_module("gpu.part").Part(name, "a fake one", limit_s, run=f"fakes:{name}", **settings)


def fakes(folder: Path) -> dict[str, str]:
    """The environment of parts that are in FAKE."""
    (folder / "fakes.py").write_text(FAKE, "utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(FOLDER), str(TESTS.parent)])}


def test_parts_have_names_limits_and_functions() -> None:
    parts = import_module("gpu.parts")
    assert len({one.name for one in parts.PARTS}) == len(parts.PARTS)
    assert sum(one.limit_s for one in parts.PARTS) <= parts.BUDGET_S <= 540
    for one in parts.PARTS:
        module, _, function = one.function.partition(":")
        assert callable(getattr(import_module(module), function)), one.name
    assert [one.name for one in parts.chosen("memory, lstm")] == ["lstm", "memory"]


def test_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = import_module("gpu.runner")
    log, limit = tmp_path / "log", 2
    log.touch()

    class Started(subprocess.Popen[Any]):
        """The short limit counts from when the part sleeps: on a busy machine its start alone takes longer."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout == limit:
                until(lambda: "processes" in log.read_text("utf-8") or self.poll() is not None, "the part that sleeps")
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(runner, "LEAST_S", 1)
    parts = [
        *map(part, ("right", "wrong", "slower", "raises", "cannot")), part("sleeps", limit),
        part("right", needs=("json", "no_such_module")), part("right", speed=True),
    ]  # fmt: skip
    records = list(runner.run_parts(parts[:6], "gpu", fakes(tmp_path), log, 540, False))
    records += runner.run_parts(parts[6:], "cpu", fakes(tmp_path), log, 540, False)
    found = [(record.part, record.verdict) for record in records]
    assert found == [
        ("right", "ok"), ("wrong", "failed"), ("slower", "goal missed"), ("raises", "failed"), ("cannot", "skipped"),
        ("sleeps", "over time"), ("right", "skipped"), ("right", "skipped"),
    ]  # fmt: skip
    assert records[0].figures == {"answer": 42, "device": "gpu", "empty": True}
    reasons = [record.why for record in records]
    assert reasons[1] == "apart by 0.5" and reasons[2] == "share is 0.5, the goal is 0.9 or more"
    assert reasons[3] == "exit 1: ValueError: no such thing"
    assert reasons[5] == f"ended after {limit} s"
    assert reasons[6] == "not installed: no_such_module" and "GPU" in reasons[7]
    said = log.read_text("utf-8")
    assert "before" in said
    # It and what it had started would sleep on for longer than anything waits for them.
    ended = [int(pid) for pid in said.split("processes ")[1].split()[:2]]
    until(lambda: not any(map(process_start, ended)), f"the end of {ended}")


def test_no_part_is_begun_without_time(tmp_path: Path) -> None:
    runner = import_module("gpu.runner")
    log = tmp_path / "log"
    log.touch()
    (record,) = runner.run_parts([part("right")], "gpu", fakes(tmp_path), log, 3, False)
    assert record.verdict == "skipped" and "no time was left" in record.why


def test_the_json_grows_and_the_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = import_module("gpu_check")
    grown = []
    plain = check.write_json

    def write(path: Path, head: Any, records: Any) -> None:
        plain(path, head, records)
        grown.append(len(json.loads(path.read_text("utf-8"))["parts"]))

    monkeypatch.setattr(check, "environment", lambda device, folder: fakes(tmp_path))
    monkeypatch.setattr(check, "write_json", write)
    for names, code in ((("right", "cannot", "slower"), 0), (("right", "wrong", "right"), 1)):
        grown.clear()
        monkeypatch.setattr(check, "chosen", lambda _words, names=names: [part(name) for name in names])
        with pytest.raises(SystemExit) as end:
            check.main(["--device", "cpu", "--out", str(tmp_path / "out")])
        assert end.value.code == code and grown == [1, 2, 3]
    found = json.loads((tmp_path / "out" / "gpu-check.json").read_text("utf-8"))
    assert found["device"] == "cpu" and found["parts"][1]["verdict"] == "failed"
    table = (tmp_path / "out" / "gpu-check.md").read_text("utf-8")
    assert "| wrong | failed |" in table and "apart by 0.5" in table
    assert table in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu-check.json", "gpu-check.log", "gpu-check.md",
    ]  # fmt: skip


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(FOLDER / "gpu_check.py"), *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S)


def test_what_cannot_be_is_said() -> None:
    """Two starts, one of which loads torch."""
    done = run("--device", "cpu", "--parts", "memory,speeed")
    assert done.returncode == 2 and "'speeed'" in done.stderr and "memory" in done.stderr
    if accelerator() is None:
        done = run("--parts", "memory")
        assert done.returncode == 2 and "sees no GPU here" in done.stderr and "--device sim" in done.stderr


def test_the_plain_model_is_the_same_model() -> None:
    config = TransformerConfig(
        layers=2, width=16, heads=2, ffn_width=32, cutoffs=[20, 40], factor=2, dropout=0, attention_dropout=0,
        activation_dropout=0, softmax_dropout=0, max_positions=12,
    )  # fmt: skip
    ours = TransformerLM(config, 60).eval()
    plain = import_module("shared.plain_lm").PlainLM(config, 60).eval()
    plain.take(ours)
    with torch.no_grad():
        count = sum(parameter.numel() for parameter in plain.parameters())
        assert count == sum(parameter.numel() for parameter in ours.parameters())
        ids = torch.randint(4, 60, (2, 13), generator=torch.Generator().manual_seed(0))
        hidden = ours(ids[:, :-1]).hidden.flatten(0, 1)
        wanted = -ours.log_probs(hidden, ids[:, 1:].flatten()).mean()
        torch.testing.assert_close(plain(ids[:, :-1], ids[:, 1:]), wanted, rtol=1e-5, atol=1e-6)
        scored = torch.arange(12).expand(2, 12) % 3 > 0
        wanted = -ours.log_probs(ours(ids[:, :-1]).hidden[scored], ids[:, 1:][scored]).mean()
        torch.testing.assert_close(plain(ids[:, :-1], ids[:, 1:], scored), wanted, rtol=1e-5, atol=1e-6)


def test_wheels_are_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = import_module("gpu.wheels")
    try:
        wanted = wheels.needs(wheels.ROOTS, wheels.LEFT_OUT, "3.12")
    except PackageNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed here")
    assert {"distlm", "deepspeed", "faiss-cpu", "transformers", "pydantic-core"} <= wanted.keys()
    assert not {"torch", "numpy", "mpi4py", "matplotlib", "pillow", "pytest"} & wanted.keys()
    assert wanted["deepspeed"].contains("0.19.8") and not wanted["deepspeed"].contains("0.19.7")
    assert "transformers" not in wheels.needs(wheels.ROOTS, [*wheels.LEFT_OUT, "transformers"], "3.12")

    def gather(folder: Path, _wanted: object, _python: str) -> None:
        (folder / "large-1.0-py3-none-any.whl").write_bytes(b"")
        os.truncate(folder / "large-1.0-py3-none-any.whl", wheels.MOST_BYTES + 1)

    monkeypatch.setattr(wheels, "gather", gather)
    monkeypatch.setattr(sys, "argv", ["wheels.py", "--into", str(tmp_path / "wheels")])
    with pytest.raises(SystemExit, match=r"60\.0 MB  large-1\.0.*\n.*WITHOUT="):
        wheels.main()
    assert not (tmp_path / "wheels").exists()
