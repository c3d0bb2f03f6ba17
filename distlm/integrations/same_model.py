"""Whether a store's keys are those of the model at hand."""

import numpy as np
import xxhash

from distlm.data.blocks import Blocks
from distlm.data.dictionary import Dictionary
from distlm.datastore.extract import hidden_states
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.models.language_model import LanguageModel

FAR = 0.01
"""Mean squared difference over mean square from which on keys are another model's. Half precision gives about 1e-5."""


def parameters_hash(model: LanguageModel) -> str:
    """xxh3-128 of names, types and values of all parameters, and of what else a state dict has, as the values of a
    memory; a model of half precision is another one."""
    digest = xxhash.xxh3_128()
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rest = [(name, kept) for name, kept in model.state_dict().items() if name not in everything]
    for name, parameter in (*model.named_parameters(), *rest):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        # Through fp32, since NumPy has no bfloat16.
        digest.update(np.ascontiguousarray(parameter.detach().float().cpu().numpy()).data)
    return digest.hexdigest()


def check_keys(model: LanguageModel, store: Datastore) -> None:
    """Compute one block of the store again, from its own values.

    Raises DistlmError when the keys are others, or when the store has no whole block whose context is stored too.
    """
    window, block = store.manifest.context.context_window, store.manifest.context.block
    shard = store.shards[0]
    # Row i holds token i + window: the first block whose context, and the token before that, are rows too.
    first = -(-(window + 1) // block) * block if window else 0
    last = min(first + block, shard.rows)
    if last <= first:
        raise DistlmError(
            f"{store.folder}: {store.rows} rows with datastore.context_window={window} are too few to tell whether "
            "they are of this model; write a store of more text, or with a smaller context window"
        )
    tokens = np.asarray(store.values(shard.index)[max(0, first - window - 1) : last], np.int64)
    if not window:
        tokens = np.concatenate([[Dictionary.EOS], tokens])
    begin = np.array([1])
    blocks = Blocks(begin, begin + window, np.array([len(tokens)]))
    made = hidden_states(model, tokens, blocks, [0], store.tap).keys.cpu().numpy()
    stored = np.asarray(store.keys(shard.index)[first:last], np.float32)
    off = float(np.mean(np.square(made - stored))) / max(float(np.mean(np.square(stored))), 1e-30)
    if not off <= FAR:
        raise DistlmError(
            f"{store.folder}: keys of another model: those of rows {first} to {last - 1}, computed again, are off by "
            f"{off:.0%} of their size; give the model that the store was written with"
        )
