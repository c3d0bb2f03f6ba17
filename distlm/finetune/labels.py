"""Whether a fine-tuned model from elsewhere numbers its labels as the task does."""

import re
from collections.abc import Mapping

from distlm.errors import DistlmError
from distlm.finetune.tasks.glue import TASKS
from distlm.runtime.progress import say


def require_label_order(model: str, named: Mapping[int, str], task: str, rank: int = 0) -> None:
    """Compare the names of a model's labels with those of finetune.task.

    `model`: as errors call it. `named`: number → name (id2label in config.json). Case does not count, nor whether words
    are joined by _, - or a space. Rank 0 says so where some are no names of the task, so that its order is assumed.
    Raises DistlmError for a label that has another number in the task: all scores would be wrong.
    """
    theirs = [str(named[number]) for number in sorted(named)]
    ours = TASKS[task].labels if task in TASKS else ()
    if not ours or len(theirs) != len(ours):
        # A number, or a model of another task, which is refused when their outputs are compared.
        return
    known = {_plain(name): number for number, name in enumerate(ours)}
    numbers = [known.get(_plain(name)) for name in theirs]
    there = f"{model}: its labels are numbered {', '.join(theirs)} (id2label in config.json)"
    if any(number not in (None, at) for at, number in enumerate(numbers)):
        raise DistlmError(
            f"{there}, those of finetune.task={task} {', '.join(ours)}; fine-tune it on the task here first"
        )
    if None in numbers:
        say(
            f"{there}, which are not the names of finetune.task={task}; taken for {', '.join(ours)} in this order", rank
        )


def _plain(name: str) -> str:
    return re.sub(r"[-\s]+", "_", name.strip()).casefold()
