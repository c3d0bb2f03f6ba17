"""The scripts of docs/integrations.md run as they stand there, with a small model in place of GPT-2."""

import re
from pathlib import Path

import pytest
from support import write_text
from support.foreign.hf import save_gpt2

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def test_the_script_of_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from transformers import PreTrainedTokenizerFast

    text = write_text(tmp_path / "text", train_lines=160)
    folder = save_gpt2(tmp_path / "gpt2", text)
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)
    monkeypatch.chdir(text)
    script, other = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert script.count('"gpt2"') == 2 and len(script.strip().splitlines()) <= 20
    capsys.readouterr()
    found: dict[str, object] = {}
    exec(script.replace('"gpt2"', repr(str(folder))), found)
    printed = capsys.readouterr().out
    assert printed.startswith("Mixing(lam=") and len(printed.strip().splitlines()) >= 3
    pytest.importorskip("lm_eval", reason="lm_eval is not here: pip install -e '.[lm-eval]'")
    # The task of the second one is on the hub: its model alone is made.
    exec(re.sub(r"found = .*model=(.*), tasks=.*", r"model = \1", other), found)
    assert type(found["model"]).__name__ == "DistlmModel"
