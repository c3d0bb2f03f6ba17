"""Every experiment can be planned: `distlm reproduce EXPERIMENT --dry-run` shows each run's command, writes nothing."""

from pathlib import Path

import pytest

from distlm.cli import main
from distlm.reproduce.experiment import experiment_names, load_experiment

INPUTS = {
    "awd-lstm": ("text",), "causal-pkm": ("text",), "knnlm": ("text", "books"),
    "pkm-plm": ("books", "wikitext", "glue"), "regularized-knnlm": ("text",),
}  # fmt: skip


SCALES = [(name, scale) for name in experiment_names() for scale in ("small", "paper")]
MORE = [("pkm-plm", "scarce"), ("pkm-plm", "scarce-quick"), ("regularized-knnlm", "overfit")]


@pytest.mark.parametrize(("name", "scale"), [*SCALES, *MORE])
def test_an_experiment_is_planned(name: str, scale: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = {key: str(tmp_path) for key in INPUTS[name]}
    given = [f"{key}={value}" for key, value in inputs.items()]
    with pytest.raises(SystemExit) as end:
        main(["reproduce", name, *given, "--scale", scale, "--into", str(tmp_path / "runs"), "--dry-run"])
    out, err = capfd.readouterr()
    assert end.value.code == 0, err
    shown = [line for line in out.splitlines() if line.startswith("distlm ")]
    items = load_experiment(name, tmp_path / "runs", inputs, scale=scale).items
    assert [line.split(" name=")[0] for line in shown] == [f"distlm {item.verb} {item.recipe}" for item in items]
    assert list(tmp_path.iterdir()) == []
