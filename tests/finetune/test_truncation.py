"""finetune.truncation: which part of a pair gives way, in the rows and in the record."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.config import config_of
from support.finetune import finetune_config, hugging_face, run, vocabulary
from support.records import unsealed

from distlm.errors import DistlmError, UsageError
from distlm.finetune.records import FinetuneResults, FinetuneSettings
from distlm.finetune.tasks.features import Frame, encode_examples, shorten
from distlm.finetune.tasks.glue import Examples

LONG, SHORT = " ".join(f"word{i}" for i in range(20)), "good1 good2 good3"


@pytest.mark.parametrize("rule", ["only_first", "only_second"])
def test_one_part_alone_is_cut(rule: str, tmp_path: Path) -> None:
    tokenizer = vocabulary(tmp_path).tokenizer()
    frame = Frame.of(tokenizer, 0)
    pair = (LONG, SHORT) if rule == "only_first" else (SHORT, LONG)
    rows = encode_examples(tokenizer, frame, Examples([pair[0]], [pair[1]], np.zeros(1, np.int64)), 16, rule)
    # What the library itself does by that rule.
    tokenizer.enable_truncation(16, strategy=rule)
    assert rows.ids.tolist() == tokenizer.encode(*pair).ids
    tokenizer.no_truncation()
    with pytest.raises(DistlmError, match=rf"finetune\.truncation={rule}: example 1 of dev: .* 20 tokens, .*=16 has"):
        encode_examples(tokenizer, frame, Examples([pair[1]], [pair[0]], np.zeros(1, np.int64)), 16, rule, "dev")


def test_pairs_that_fit_stay_whole_by_every_rule() -> None:
    for rule in ("longest_first", "only_first", "only_second"):
        assert shorten(3, 4, 7, rule) == (3, 4) and shorten(0, 7, 7, rule) == (0, 7)


@pytest.mark.parametrize("task", ["SST-2", "CoLA", "SQuAD"])
def test_it_is_refused_where_there_are_no_pairs(task: str) -> None:
    with pytest.raises(UsageError, match=rf"finetune\.truncation.*only_first.*leave it out for {task}"):
        config_of("plm-base", [f"finetune.task={task}", "finetune.truncation=only_first"])


def test_the_record_names_it_and_an_older_one_had_todays(tmp_path: Path) -> None:
    model = hugging_face(tmp_path / "hf")
    data = tmp_path / "glue"
    (data / "RTE").mkdir(parents=True)
    for name in ("train", "dev"):
        rows = [f"{i}\t{LONG}\t{SHORT}\t{'not_' * (i % 2)}entailment" for i in range(16)]
        (data / "RTE" / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]), "utf-8")
    given = (f"finetune.checkpoint={model}", "finetune.task=RTE", "finetune.epochs=1", "finetune.length=16")
    run(finetune_config(tmp_path / "run", data, *given))
    path = tmp_path / "run" / "finetune" / "RTE" / "settings.json"
    tree = unsealed(path)
    assert tree.pop("truncation") == "longest_first"
    results = FinetuneResults.read(path.with_name("results.json"))
    assert results.settings.truncation == "longest_first"
    # As a version without the setting wrote them.
    path.write_text(json.dumps(tree), "utf-8")
    assert FinetuneSettings.read(path).config.truncation == "longest_first"
    run(finetune_config(tmp_path / "run", data, *given))
    old = unsealed(path.with_name("results.json"))
    del old["settings"]["truncation"]
    path.with_name("results.json").write_text(json.dumps(old), "utf-8")
    assert FinetuneResults.read(path.with_name("results.json")).settings.truncation == "longest_first"
    with pytest.raises(DistlmError, match=r"finetune\.truncation: 'longest_first' there, 'only_first' now"):
        run(finetune_config(tmp_path / "run", data, *given, "finetune.truncation=only_first"))
