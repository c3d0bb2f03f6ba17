"""docs/from-urvashik-knnlm.md: its commands, in its order, on a small text; and no flag of the original is missing."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import TINY, write_text
from support.foreign.fairseq import fairseq_model, write_checkpoint

from distlm.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/from-urvashik-knnlm.md").read_text("utf-8")
SIZES = [word for word in TINY if not word.startswith(("name=", "knn.nprobe", "knn.ks"))]
FLAGS = [
    "--knnlm",
    "--save-knnlm-dstore",
    "--dstore-mmap",
    "--dstore-filename",
    "--dstore-size",
    "--indexfile",
    "--knn-keytype",
    "--probe",
    "--k",
    "--lmbda",
    "--knn-sim-func",
    "--faiss-metric-type",
    "--no-load-keys",
    "--dstore-fp16",
    "--move-dstore-to-mem",
    "--lm-eval",
    "--softmax-batch",
    "--context-window",
    "--model-overrides",
    "--output-word-probs",
    "--output-word-stats",
    "--remove-bpe",
    "--path",
    "--gen-subset",
    "--max-tokens",
    "--tokens-per-sample",
    "--sample-break-mode",
    "--fp16",
    "--dstore_mmap",
    "--dstore_size",
    "--dimension",
    "--dstore_fp16",
    "--seed",
    "--ncentroids",
    "--code_size",
    "--faiss_index",
    "--num_keys_to_add_at_a_time",
    "--starting_point",
    "--only-source",
    "--trainpref",
    "--validpref",
    "--testpref",
    "--destdir",
    "--workers",
    "--save-dir",
    "--arch",
    "--max-update",
    "--max-lr",
    "--t-mult",
    "--lr-period-updates",
    "--lr-scheduler",
    "--lr-shrink",
    "--warmup-updates",
    "--warmup-init-lr",
    "--min-lr",
    "--optimizer",
    "--lr",
    "--clip-norm",
    "--criterion",
    "--update-freq",
    "--ddp-backend",
    "--skip-invalid-size-inputs-valid-test",
]


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_every_flag_of_the_original_has_a_row() -> None:
    left = {flag for row in re.findall(r"^\|(.*?)\|", PAGE, re.MULTILINE) for flag in re.findall(r"--[\w-]+", row)}
    assert set(FLAGS) <= left, sorted(set(FLAGS) - left)


def test_the_pages_commands_from_text_to_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = write_text(tmp_path / "text", train_lines=200)
    monkeypatch.chdir(tmp_path)
    places = {"/path/to/wikitext-103": str(text), "/path/to/dict.txt": "dict.txt", "/path/to/": f"{tmp_path}/"}
    write_checkpoint(tmp_path / "checkpoint_best.pt", fairseq_model(64))
    done = []
    for command in commands():
        assert command[0] == "distlm"
        if command[1] == "run":
            # The same stages as processes of their own: tests/pipeline/test_run.py.
            continue
        words = [re.sub("|".join(places), lambda found: places[found[0]], word) for word in command[1:]]
        small = ["knn.ks=[16]" if word.startswith("knn.ks=") else word for word in words]
        small += [] if any(word.startswith("knn.nprobe") for word in words) else ["knn.nprobe=4"]
        small += [] if any(word.startswith("knn.ks=") for word in words) else ["knn.ks=[4,16]"]
        with pytest.raises(SystemExit) as end:
            main([*small, *SIZES, "train.updates=4"])
        assert end.value.code == 0, f"{shlex.join(command)}\n{capsys.readouterr().err}"
        done.append(" ".join(words[:2]))
        if done == ["data prepare"]:
            shutil.copy("runs/mine/tokens/dict.txt", "dict.txt")
    assert len(done) == len(set(done)) + 5, "five commands are shown for both runs"
    for name, weight in (("mine", 0.25), ("theirs", None)):
        results = json.loads((tmp_path / "runs" / name / "results.json").read_text("utf-8"))
        assert weight is None or results["settings"]["lambda"] == weight
        assert results["splits"]["test"]["knn"]["perplexity"] > 1
    alone = json.loads((tmp_path / "runs/mine/lm.json").read_text("utf-8"))
    together = json.loads((tmp_path / "runs/mine/results.json").read_text("utf-8"))
    for split in ("valid", "test"):
        assert alone["splits"][split]["perplexity"] == pytest.approx(together["splits"][split]["lm"]["perplexity"])
    assert results["settings"]["distances"] == "quantised" and results["settings"]["nprobe"] == 8
    assert (tmp_path / "runs/mine/report.html").is_file()
