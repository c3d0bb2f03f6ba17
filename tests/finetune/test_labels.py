"""The order of a foreign model's labels."""

import pytest

from distlm.errors import DistlmError
from distlm.finetune.labels import require_label_order


@pytest.mark.parametrize(
    ("task", "theirs"),
    [
        ("MNLI", ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")),
        ("MNLI", ("contradiction", "Neutral", "entailment ")),
        ("QNLI", ("not entailment", "ENTAILMENT")),
        ("RTE", ("Not-Entailment", "Entailment")),
        # One of the names tells it.
        ("RTE", ("LABEL_0", "entailment")),
        ("SST-2", ("1", "0")),
    ],
)
def test_another_order_is_refused_however_the_names_are_spelled(task: str, theirs: tuple[str, ...]) -> None:
    named = dict(enumerate(theirs))
    with pytest.raises(
        DistlmError, match=rf"model: its labels are numbered {', '.join(theirs)} .*finetune.task={task}"
    ):
        require_label_order("model", named, task)


@pytest.mark.parametrize(
    ("task", "theirs"),
    [
        ("MNLI", ("ENTAILMENT", "Neutral", "contradiction")),
        ("QNLI", ("entailment", "not-entailment")),
        ("STS-B", ("LABEL_0",)),
        # Of another task: refused where the outputs are compared.
        ("SST-2", ("a", "b", "c")),
        ("", ("LABEL_0", "LABEL_1")),
    ],
)
def test_the_task_s_own_order_needs_no_word(
    task: str, theirs: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    require_label_order("model", dict(enumerate(theirs)), task)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("theirs", [("LABEL_0", "LABEL_1"), ("NEGATIVE", "POSITIVE")])
def test_names_that_are_not_the_task_s_are_said_once(
    theirs: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        require_label_order("model", dict(enumerate(theirs)), "SST-2", rank)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"model: its labels are numbered {', '.join(theirs)} (id2label in config.json), which are not the names of "
        "finetune.task=SST-2; taken for 0, 1 in this order"
    )
