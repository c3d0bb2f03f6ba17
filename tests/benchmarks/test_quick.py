"""Every benchmark runs: once at the sizes of --quick, with its figures in what it prints; and shows what is shown."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ENVIRONMENT, TESTS
from support.deadline import DEADLINE_S

FOLDER = TESTS.parent / "benchmarks"
BENCHMARKS = sorted(path.name for path in FOLDER.glob("*.py"))

FIGURES = {
    "add_codes.py": ("widths/16/PQ16/ratio", "widths/32/PQ8x4fs/keys_per_s", "least_ratio"),
    "cache.py": ("tokens_per_s/loop", "tokens_per_s/distlm", "perplexity/distlm"),
    "candidates.py": (
        "plain_added_s",
        "factories/PCAR8,IVF16,RaBitQ/added_s",
        "factories/PCA8,IVF16,SQ4/search/nprobe all, of 64/recall",
        "factories/PCA8,IVF16,SQ4/search/nprobe all, of 64/ms_with_exact",
        "plain/nprobe 2, of 32/ms",
    ),
    "datastore_write.py": ("rows_per_s/write", "ratio_of_totals"),
    "full_rows.py": (
        "rows",
        "stages/datastore write/seconds",
        "stages/datastore write/same_bytes",
        "stages/index merge/same_bytes",
        "stages/knn search/peak_MB/1",
    ),
    "index.py": ("times_as_fast/add: ours, pick", "times_as_fast/search: ours, same", "recall/plain"),
    "index_train.py": ("quality/faiss/recall", "turns/2 ranks/0/peak_MB", "ratios/distance, ours / faiss"),
    "knn_eval.py": ("ratios/time/original mask / distlm first", "tokens_per_s/distlm further", "tuning/best_nats"),
    "knn_generate.py": ("ratios/with / plain", "ratios/mixture / plain", "processor_ms_per_step/search"),
    "list_scan.py": ("lists_over_faiss/lists, 2 ranks, cold", "lists_over_faiss/lists, 2 ranks, warm", "bytes"),
    "lstm.py": ("results/0/ratio", "results/0/usual_tokens_per_s"),
    "memory.py": (
        "layers/distlm/seconds",
        "times_as_much_as_distlm/sparse/seconds",
        "values/distlm_bf16/seconds",
        "lookup/seconds",
        "step/256/rows",
    ),
    "merge.py": ("bytes", "peak_MB_per_rank/merge, 2 ranks"),
    "plan.py": (
        "builds/0/index train/bytes_predicted_over_measured",
        "builds/0/index merge/bytes_predicted_over_measured",
    ),
    "pretrained.py": (
        "per_word/valid/transformers",
        "per_word/valid/lm",
        "per_word/test/knn",
        "per_word/test/knn_buckets",
        "rows",
    ),
    "units.py": ("write/times_as_fast", "write/planned/4", "search/times_as_fast", "search/processor_s/2/0"),
    "ranks.py": ("ranks/8/start/operations", "ranks/8/rounds/operations_per_s", "growth/rounds/operations"),
    "rescoring.py": ("ratios/warm/scoring", "tokens_per_s/sorted_scoring/cold", "recall/IVF16,PQ4x4"),
}
"""Numbers above 0 in the JSON of each."""
TEXT = {
    "contained.py": (r"easy/RTE/train.tsv: \d{2,} lines", r"folds/2/RTE/dev.tsv: \d{2,} lines"),
    "gpu_check.py": (r"\| datastore \| ok \| .*writing over forward alone \d",),
    "pairs.py": (r"rows/train.txt: \d{4} lines", r"glue/MRPC/train.tsv: \d{3} lines"),
    "peers.py": (r"\| plain torch \| \d[\d,]* \| \d[\d,]* \| \d+\.\d\d \|", r"\| plain torch as ports have it \| \d"),
    "plm.py": (r"transformers, predicted tokens only +\d+\.\d{3} +\d+\.\d\d +\d\.\d\d +\d+\.\d\d\n",),
}
"""Patterns in what the others print."""
NO_FIGURES = "made with --quick, which only shows that the benchmark runs: these are not figures"


def run(name: str, *words: object, folder: Path) -> str:
    """`python benchmarks/NAME --quick WORDS` in a folder; what it printed."""
    command = [sys.executable, str(FOLDER / name), "--quick", *map(str, words)]
    # A benchmark that starts mpirun allows root itself.
    environment = {variable: value for variable, value in ENVIRONMENT.items() if not variable.startswith("OMPI_ALLOW")}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    assert NO_FIGURES in done.stdout
    return done.stdout


def number(figures: Any, path: str) -> float:
    """The number at `path`, whose steps end with a slash that no blank follows."""
    for step in re.split(r"(?<! )/(?! )", path):
        figures = figures[int(step)] if isinstance(figures, list) else figures[step]
    return float(figures)


SLOW = ("full_rows.py", "knn_eval.py", "list_scan.py", "pretrained.py", "units.py")
"""They train, or start stages on several ranks: half of the time of all."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in BENCHMARKS]
)
def test_quick_prints_the_figures(name: str, tmp_path: Path) -> None:
    words: dict[str, list[str | Path]] = {
        "knn_eval.py": ["--keep", tmp_path / "kept"],
        "gpu_check.py": ["--parts", "datastore"],
        # All of them: test_peers.py.
        "peers.py": ["--only", "lstm"],
    }
    printed = run(name, *words.get(name, []), folder=tmp_path)
    if name in TEXT:
        assert all(re.search(pattern, printed) for pattern in TEXT[name]), printed
        return
    assert name in FIGURES, f"say above which figures benchmarks/{name} prints"
    figures = json.loads(printed)
    assert all(number(figures, path) > 0 for path in FIGURES[name]), printed
    assert figures["machine"]["machine"] and figures["machine"]["load"], printed
    if name == "knn_eval.py":
        # The run that it made is one for the two others that take a run.
        for other in ("cache.py", "rescoring.py"):
            figures = json.loads(run(other, "--run-dir", tmp_path / "kept" / "run", folder=tmp_path))
            assert figures["source"] == "run, valid"
    if name == "index.py":
        assert number(json.loads(run(name, "--ranks", folder=tmp_path)), "two_over_one/add") > 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "kept"] == []
