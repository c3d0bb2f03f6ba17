"""A causal language model of Hugging Face becomes the first checkpoint of a run, as it is: `distlm import hf`, and
`distlm train` with train.updates=0."""

import argparse
import time

from distlm.data.tokens import TokenFiles
from distlm.errors import UsageError
from distlm.models.buffers import kept_buffers
from distlm.models.described import require_tap
from distlm.models.hf.config import HfRun
from distlm.models.hf.job import model_for
from distlm.models.hf.model import pretrained
from distlm.models.hf.plan import plan_import
from distlm.runtime.files import bytes_below, require_free_disk
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS, VALID_LOSS, VALID_PPL
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.training.start.imported import of_blocks, refuse_trained, write_first_checkpoint


def import_hf(config: HfRun, _options: argparse.Namespace | None = None) -> dict[str, object]:
    """Write the weights of hf.name, as they are, as checkpoint step-00000000 and the best one, with its loss on valid.

    The later stages then work with that model, and `distlm train` fine-tunes it. Raises DistlmError for what
    distlm.models.hf.model refuses, and when the run has checkpoints.
    """
    run, name = RunDir.of(config), config.hf.name
    if config.memory.kind != "none":
        raise UsageError(
            f"memory.kind={config.memory.kind}: a model is imported as it is; leave memory.* out, or begin with "
            "`distlm train`, which starts a fresh memory beside the weights of hf.name"
        )
    refuse_trained(run)
    tokens = TokenFiles.open(run.tokens(config))
    model = model_for(config.hf, tokens, config.train)
    require_tap(model, config.train.tap, "train.tap")
    hf = pretrained(name, model, len(tokens.dictionary))
    weights, buffers = dict(hf.named_parameters()), kept_buffers(hf)
    return write_first_checkpoint(config, tokens, model, weights, name, *of_blocks(config, tokens), buffers=buffers)


def take(stage: Stage) -> dict[str, object]:
    """The stage `train` of a run that trains nothing: as import_hf, or nothing where that was done. Collective.

    Rank 0 works, the others wait.
    """
    config, run = stage.config, stage.run
    assert isinstance(config, HfRun)
    first, name = run.checkpoint(0), config.hf.name
    with only_writer(run.checkpoints, stage.comm, "importing"):

        def work() -> dict[str, object]:
            if first in run.complete_checkpoints():
                say(f"{stage.name}: {first} is there; nothing to do (train.updates=0)")
                return {"checkpoint": str(first)}
            plan, began = plan_import(config), time.monotonic()
            say(plan.line())
            # What a killed start has left is replaced.
            require_free_disk(run.root, max(plan.disk_bytes - bytes_below(run.checkpoints), 0), "the imported model")
            made = import_hf(config)
            took = time.monotonic() - began
            figures = {VALID_LOSS: made["valid_loss"], VALID_PPL: made["valid_ppl"], STAGE_SECONDS: round(took, 3)}
            run.metrics.write("train", {name: float(str(value)) for name, value in figures.items()}, step=0)
            say(f"{stage.name}: imported hf.name={name} as it is (train.updates=0)")
            return made

        return rank0_first(stage.comm, work)
