"""`distlm run` of an AWD-LSTM: tokens, training, evaluation; again it does nothing."""

import json
from pathlib import Path

from support import TINY, distlm, write_text
from support.kinds import readable
from support.lstm import LSTM


def test_an_awd_lstm_is_trained_and_evaluated(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    short = ["awd.batch=40", "awd.epochs=2", "awd.finetune_epochs=0", "launch.ranks=2", "data.source=folder"]
    words = readable([*TINY, *LSTM, *short, f"data.text_dir={text}", f"run_dir={tmp_path / 'run'}"])
    dry = distlm("run", "awd-lstm-small", *words, "--dry-run").stdout
    assert (
        "distlm train awd-lstm-small" in dry
        and "distlm evaluate awd-lstm-small" in dry
        and "distlm datastore write" not in dry
    )
    done = distlm("run", "awd-lstm-small", *words)
    results = json.loads((tmp_path / "run" / "lm.json").read_text("utf-8"))
    for split in ("valid", "test"):
        assert f"{results['splits'][split]['perplexity']:.2f}" in done.stdout
    assert not (tmp_path / "run" / "datastore").exists()
    again = distlm("run", "awd-lstm-small", *words)
    assert "complete; nothing to do" in again.stderr and "perplexity" in again.stdout
    assert "LM report" in (tmp_path / "run" / "report.html").read_text("utf-8")
