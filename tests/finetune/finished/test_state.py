"""Whether fine-tuning is finished, and which tasks a configuration asks for."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.config import config_of
from support.finetune import evaluate, finetune_config, pretrained, run, write_sst2

from distlm.analysis.report import write_report
from distlm.errors import DistlmError, UsageError
from distlm.finetune.finished.state import all_results, begun, finetuned, require_ranks
from distlm.models.plm.config import FinetuneConfig, PlmRun
from distlm.runtime.rundir import RunDir


def asked(*overrides: str) -> list[tuple[str, str, float]]:
    found = config_of("plm-base", ["run_dir=nowhere", *overrides]).section(FinetuneConfig)
    return [(one.task, one.name, one.lr) for one in found.each()]


def test_each_task_has_its_own_folder_and_defaults() -> None:
    assert asked() == [("SST-2", "SST-2", 2e-5)]
    assert asked("finetune.task=MRPC", "finetune.memory=frozen") == [("MRPC", "MRPC-frozen", 2e-5)]
    assert asked("finetune.tasks=[CoLA,SQuAD]") == [("CoLA", "CoLA", 2e-5), ("SQuAD", "SQuAD", 5e-5)]
    assert asked("finetune.tasks=[CoLA]", "finetune.name=mine") == [("CoLA", "mine", 2e-5)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["finetune.tasks=[CoLA]", "finetune.task=MRPC"], r"finetune\.task='MRPC': .*for the one finetune\.tasks=\[\]"),
        (["finetune.tasks=[CoLA,CoLA]"], r"finetune\.tasks=.*: name each once"),
        (["finetune.tasks=[CoLA,RTE]", "finetune.name=mine"], r"finetune\.name='mine': is the folder of one task"),
        (["finetune.tasks=[RTE,SQuAD]", "finetune.train_rows=9"], r"finetune\.train_rows=9: is for the tasks of GLUE"),
        (["finetune.tasks=[RTE,CoLA]", "finetune.truncation=only_first"], r"leave it out for CoLA"),
        (["finetune.tasks=[SST2]"], r"finetune\.tasks"),
    ],
)
def test_tasks_that_do_not_go_together(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        asked(*overrides)


def test_ranks_must_divide_the_rows_of_every_task() -> None:
    config = config_of("plm-base", ["run_dir=nowhere", "finetune.tasks=[CoLA,SST-2]", "finetune.rows_per_update=6"])
    require_ranks(config, 3)
    with pytest.raises(DistlmError, match=r"finetune\.micro_rows=6: .*and 4 ranks do not divide it"):
        require_ranks(config, 4)


def test_finished_with_these_seeds_settings_and_checkpoint_alone(tmp_path: Path) -> None:
    data, where = write_sst2(tmp_path / "glue", train=32, dev=12), pretrained(tmp_path / "run")

    def config(*more: str) -> PlmRun:
        given = ["finetune.task=", "finetune.tasks=[SST-2]", "finetune.epochs=1", "finetune.keep_models=true", *more]
        return finetune_config(where, data, *given)

    def finished(*more: str) -> bool:
        return finetuned(config(*more), RunDir.of(config()))

    assert not finished() and not begun(config(), RunDir.of(config()))
    summary: dict[str, Any] = run(config())
    assert summary["task"] == "SST-2" and finished() and begun(config(), RunDir.of(config()))
    assert evaluate(config())["accuracy"] == summary["accuracy"]
    assert not finished("finetune.seeds=[1,2]") and not finished("finetune.lr=0.001")
    assert not finished("finetune.tasks=[SST-2,CoLA]")
    # Before anything was evaluated there is a page of these results alone.
    page = write_report(RunDir.of(config())).read_text("utf-8")
    assert "fine-tuning report" in page and "<h1>run</h1>" in page and "accuracy" in page
    assert [found.task for found in all_results(RunDir.of(config()))] == ["SST-2"]
    # Pretrained for longer, it is another model.
    shutil.copytree(where / "checkpoints" / "step-00000007", where / "checkpoints" / "step-00000009")
    assert not finished()
