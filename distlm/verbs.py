"""The verbs of the command line: which function each calls, and which sections of the configuration it reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One stage as a command. `function` takes a Stage and returns a dict; `plan` takes (config, ranks)."""

    words: str
    summary: str
    stage: str
    function: str
    plan: str = ""
    ranks: bool = True
    """Worth several ranks."""
    recorded: str = ""
    """Takes (config, rank) and gives the config with what the run directory has recorded; empty: as it was given."""


STAGE_VERBS: tuple[Verb, ...] = (
    Verb(
        "data prepare",
        "text to token files",
        "prepare",
        "distlm.data.prepare:run_prepare",
        "distlm.data.prepare:plan_prepare",
        ranks=False,
    ),
    Verb(
        "data shard",
        "text to shards of token rows, for masked language models",
        "shard",
        "distlm.data.shards.stage:run_shard",
        "distlm.data.shards.stage:plan_shard",
    ),
    Verb(
        "train",
        "train the language model with DeepSpeed",
        "train",
        "distlm.training.loop:run_train",
        "distlm.training.loop:plan_train",
    ),
    Verb(
        "evaluate",
        "perplexity of the language model alone, or of a masked language model's masked tokens",
        "train",
        "distlm.training.evaluate:run_evaluate",
        "distlm.training.evaluate:plan_evaluate",
        ranks=False,
    ),
    Verb(
        "finetune",
        "fine-tune a masked language model on a task of GLUE or on SQuAD, once per seed",
        "finetune",
        "distlm.finetune.stage:run_finetune",
        "distlm.finetune.plan:plan_finetune",
        recorded="distlm.finetune.pretraining:as_pretrained",
    ),
    Verb(
        "datastore write",
        "write keys and values of the training tokens",
        "datastore",
        "distlm.datastore.writer:run_datastore_write",
        "distlm.datastore.writer:plan_datastore",
    ),
    Verb("index train", "train the index template", "index", "distlm.index:run_index_train", "distlm.index:plan_index"),
    Verb("index add", "add every shard to its part", "index", "distlm.index:run_index_add", "distlm.index:plan_index"),
    Verb("index merge", "merge the parts", "index", "distlm.index:run_index_merge", "distlm.index:plan_index"),
    Verb("index build", "train, add and merge", "index", "distlm.index:run_index_build", "distlm.index:plan_index"),
    Verb(
        "knn search",
        "neighbours of each split, to files",
        "knn",
        "distlm.knnlm.search.stage:run_search",
        "distlm.knnlm.plan:plan_search",
    ),
    Verb(
        "knn cache",
        "neural-cache probabilities of each split, to files",
        "knn",
        "distlm.knnlm.cache.stage:run_cache",
        "distlm.knnlm.cache.plan:plan_cache",
    ),
    Verb(
        "knn tune",
        "choose λ, temperature and k (and λ, θ and window of the cache) on the first split",
        "knn",
        "distlm.knnlm.tune.stage:run_tune",
        "distlm.knnlm.plan:plan_tune",
        ranks=False,
    ),
    Verb(
        "knn evaluate",
        "perplexities with the frozen settings",
        "knn",
        "distlm.knnlm.evaluate.stage:run_evaluate",
        "distlm.knnlm.plan:plan_evaluate",
        ranks=False,
    ),
)

EVALUATE_FINETUNED = Verb(
    "finetune",
    "score fine-tuned models that are finished, and write their predictions",
    "finetune",
    "distlm.finetune.finished.evaluate:run_evaluate_finetuned",
    "distlm.finetune.finished.evaluate:plan_evaluate_finetuned",
    recorded="distlm.finetune.pretraining:as_pretrained",
)
"""What `distlm finetune --evaluate-only` is."""

SHARED_VERBS = ("datastore write", "index add")
"""Verbs whose units independent processes can share out (launch.share)."""
