"""`distlm export hf`, whatever the kind of model: the folder is written, and uploaded where that is asked for."""

import argparse
from collections.abc import Callable
from pathlib import Path

from distlm.errors import DistlmError, UsageError
from distlm.models.export.folder import require_new
from distlm.models.export.push import Repository


def export_model(
    options: argparse.Namespace, checkpoint: Path, write: Callable[[Path], None], finetuned: bool = False
) -> dict[str, object]:
    """`write` writes a folder of the model of `checkpoint`; what was made, as the command prints it.

    `finetuned`: whether it is a fine-tuned model; --finetuned and --seed are for those. Raises DistlmError for a folder
    that is there, and for what is wrong with --push, before anything is written.
    """
    for flag in ("finetuned", "seed"):
        if not finetuned and getattr(options, flag, None) is not None:
            raise UsageError(f"--{flag} is for fine-tuned models, those of model.kind=plm; leave it out")
    out = Path(options.out)
    require_new(out)
    push = getattr(options, "push", None)
    repository = Repository.check(push, not options.public) if push else None
    write(out)
    found: dict[str, object] = {"checkpoint": str(checkpoint), "folder": str(out)}
    if repository is not None:
        try:
            found["repository"] = repository.upload(out)
        except DistlmError as error:
            raise DistlmError(f"{error} ({out} is whole)") from error
    return found
