"""Which texts a masked language model is evaluated on, and whether that is done. Without torch."""

from pathlib import Path

from distlm.data.shards.reader import ShardRows
from distlm.errors import DistlmError
from distlm.models.card import model_fingerprint
from distlm.models.complete import memory_files
from distlm.models.plm.config import PlmRun
from distlm.runtime.rundir import RunDir
from distlm.training.finished import RESULT
from distlm.training.records import LmResults


def masked_as_trained(config: PlmRun, run: RunDir) -> bool:
    """Whether lm.json was made with the newest checkpoint's weights and values, and with these masks and rows. A file
    of an older version does not say so, and counts as made with others."""
    path = run.root / RESULT
    if not path.exists():
        return False
    results = LmResults.read(path)
    try:
        texts = open_texts(config, run)
    except DistlmError:
        # What is wrong with them is for the evaluation to say.
        return False
    model, checkpoint = results.model, run.newest_checkpoint()
    there = [model.fingerprint, model.memory_files, results.mask_seed, results.mask_share]
    now = [model_fingerprint(checkpoint), memory_files(checkpoint), config.train.seed, config.plm.mask_share]
    rows = {name: found.rows_fingerprint for name, found in results.splits.items()}
    return there == now and all(rows.get(name) == found.fingerprint for name, found in texts.items())


def open_texts(config: PlmRun, run: RunDir) -> dict[str, ShardRows]:
    """Name → rows that a masked language model is evaluated on: valid and test of its shards, and those of plm.texts.

    Raises DistlmError for shards that are missing or damaged, and for plm.texts that are no NAME=FOLDER.
    """
    folder = run.shards(config)
    texts: dict[str, ShardRows] = {}
    for split in ("valid", "test"):
        if split in config.shards.splits:
            texts[split] = ShardRows.open(folder, split)
    for word in config.plm.texts:
        name, equals, path = word.partition("=")
        if not equals or name in texts:
            raise DistlmError(f"plm.texts: {word!r}: give each as NAME=FOLDER of shards, every name once")
        texts[name] = ShardRows.open(Path(path), "test")
    return texts
