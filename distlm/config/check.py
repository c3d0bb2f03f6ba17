"""Values that have the right type and cannot work: refused at loading, before anything is started."""

from collections.abc import Callable

from distlm.config.schema import RunConfig
from distlm.errors import UsageError

_AT_LEAST_ONE = (
    "data.min_count", "data.pad_to_multiple", "model.layers", "model.width", "model.heads", "model.ffn_width",
    "model.factor", "model.max_positions", "train.tokens_per_sample", "train.blocks_per_update",
    "train.micro_blocks", "train.updates", "train.keep_last", "train.log_every", "datastore.block",
    "datastore.batch_blocks", "datastore.rows_per_shard", "lstm.layers", "lstm.width", "lstm.hidden_width",
    "lstm.max_positions", "awd.batch", "awd.bptt", "awd.epochs", "awd.nonmono", "awd.valid_batch",
    "index.sample", "knn.block", "knn.batch_blocks",
    "plm.layers", "plm.width", "plm.heads", "plm.ffn_width", "plm.max_positions", "memory.sub_keys", "memory.heads",
    "memory.k", "memory.key_width", "knn.blocks_per_unit", "knn.k", "knn.nprobe", "launch.ranks",
    "shards.chunk_rows", "shards.shard_text", "train.queue_length",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "data.max_words", "train.warmup_updates", "train.weight_decay", "train.clip_norm", "train.lr", "train.min_lr",
    "train.l2_weight", "train.valid_every", "train.save_every", "train.max_updates_this_run",
    "datastore.context_window", "knn.buckets", "knn.ladder_sample", "knn.context_window", "launch.threads",
    "awd.micro_batch", "awd.ar", "awd.tar", "awd.finetune_epochs", "awd.log_interval", "shards.vocabulary_text",
    "memory.columns", "memory.lr", "memory.clip_norm",
)  # fmt: skip
_FRACTIONS = (
    "model.dropout", "model.attention_dropout", "model.activation_dropout", "model.softmax_dropout",
    "lstm.embedding_dropout", "lstm.input_dropout", "lstm.hidden_dropout", "lstm.output_dropout", "lstm.weight_dropout",
    "plm.dropout", "plm.attention_dropout", "memory.input_dropout", "memory.query_dropout", "memory.value_dropout",
    "train.encoder_momentum",
)  # fmt: skip


def check_values(config: RunConfig, where: str) -> None:
    """Raises UsageError naming the setting, its value and what would do."""

    def refuse(key: str, value: object, mend: str) -> None:
        raise UsageError(f"{where}: {key}={value!r}: {mend}")

    def value_of(key: str) -> float:
        section, _, name = key.partition(".")
        return float(getattr(getattr(config, section), name))

    for key in _AT_LEAST_ONE:
        if value_of(key) < 1:
            refuse(key, int(value_of(key)), "must be at least 1")
    for key in _AT_LEAST_ZERO:
        if value_of(key) < 0:
            refuse(key, value_of(key), "must not be negative")
    for key in _FRACTIONS:
        if not 0 <= value_of(key) < 1:
            refuse(key, value_of(key), "must be in [0, 1)")
    if config.model.width % config.model.heads:
        refuse("model.width", config.model.width, f"must be a multiple of model.heads={config.model.heads}")
    if config.model.cutoffs != sorted(set(config.model.cutoffs)) or any(edge < 1 for edge in config.model.cutoffs):
        refuse("model.cutoffs", config.model.cutoffs, "must be rising positive numbers")
    if config.train.blocks_per_update % config.train.micro_blocks:
        refuse(
            "train.blocks_per_update", config.train.blocks_per_update,
            f"must be a multiple of train.micro_blocks={config.train.micro_blocks}",
        )  # fmt: skip
    if config.data.tokenizer and config.data.dictionary:
        refuse("data.dictionary", config.data.dictionary, "the tokens of data.tokenizer are its own; leave one out")
    _check_kind(config, refuse)
    _check_regulariser(config, refuse)
    _check_shards(config, refuse)
    _check_finetune(config, refuse)
    _check_lengths(config, refuse)
    _check_grids(config, refuse)
    _check_cache(config, refuse)


def _check_kind(config: RunConfig, refuse: Callable[[str, object, str], None]) -> None:
    train = config.train
    if config.model.kind != "awd_lstm":
        if train.optimizer == "nt_asgd":
            refuse("train.optimizer", train.optimizer, "needs model.kind=awd_lstm; use nag or adam")
        if config.model.kind == "plm":
            _check_plm(config, refuse)
        return
    if train.optimizer != "nt_asgd":
        refuse("train.optimizer", train.optimizer, "model.kind=awd_lstm is trained with train.optimizer=nt_asgd")
    if train.precision != "fp32":
        # A rate of 30 and a mean over 10^5 steps do not survive 11 bits of mantissa.
        refuse("train.precision", train.precision, "model.kind=awd_lstm needs fp32 weights and averages; set fp32")
    if train.l2_weight:
        refuse(
            "train.l2_weight", train.l2_weight, "is the transformer's penalty; awd.ar is that of model.kind=awd_lstm"
        )
    if config.data.tokenizer:
        refuse("data.tokenizer", config.data.tokenizer, "model.kind=awd_lstm reads words; leave it out")
    if config.awd.on_trigger != "nothing" and not train.valid_every:
        refuse(
            "train.valid_every", 0,
            f"awd.on_trigger={config.awd.on_trigger} is triggered by validation losses, of which this makes none; "
            "leave it out (an AWD-LSTM is validated after every epoch), or set awd.on_trigger=nothing",
        )  # fmt: skip
    if config.awd.micro_batch and config.awd.batch % config.awd.micro_batch:
        refuse("awd.batch", config.awd.batch, f"must be a multiple of awd.micro_batch={config.awd.micro_batch}")


def _check_regulariser(config: RunConfig, refuse: Callable[[str, object, str], None]) -> None:
    train = config.train
    if not 1 <= train.queue_fill <= train.queue_length:
        refuse("train.queue_fill", train.queue_fill, f"must be between 1 and train.queue_length={train.queue_length}")
    if train.regulariser != "l2" and config.model.kind != "transformer_lm":
        refuse("train.regulariser", train.regulariser, "needs model.kind=transformer_lm; leave it at l2")


def _check_finetune(config: RunConfig, refuse: Callable[[str, object, str], None]) -> None:
    tune = config.finetune
    for key, least in (
        ("rows_per_update", 1), ("stride", 1), ("answer_tokens", 1), ("epochs", 0), ("length", 0), ("micro_rows", 0),
        ("lr", 0), ("memory_lr", 0), ("clip_norm", 0), ("save_every", 0), ("max_updates_this_run", 0),
        ("train_rows", 0),
    ):  # fmt: skip
        if getattr(tune, key) < least:
            refuse(f"finetune.{key}", getattr(tune, key), f"must be at least {least}")
    if not tune.seeds or len(set(tune.seeds)) < len(tune.seeds):
        refuse("finetune.seeds", tune.seeds, "name at least one seed, each once")
    if tune.train_rows and tune.task == "SQuAD":
        refuse("finetune.train_rows", tune.train_rows, "is for the tasks of GLUE; leave it 0 for SQuAD")
    if tune.dropout != -1 and not 0 <= tune.dropout < 1:
        refuse("finetune.dropout", tune.dropout, "must be in [0, 1), or -1 for the checkpoint's own")
    if not 0 <= tune.warmup < 1:
        refuse("finetune.warmup", tune.warmup, "must be in [0, 1)")
    if "/" in tune.name or tune.name.startswith("."):
        refuse("finetune.name", tune.name, "is the name of a folder: neither / in it nor . at its start")


def _check_shards(config: RunConfig, refuse: Callable[[str, object, str], None]) -> None:
    shards, known = config.shards, ("train", "valid", "test")
    if not shards.splits or len({*shards.splits}) < len(shards.splits) or not {*shards.splits} <= {*known}:
        refuse("shards.splits", shards.splits, f"name some of {', '.join(known)}, each once")
    if shards.row_tokens < 8:
        refuse("shards.row_tokens", shards.row_tokens, "must be at least 8; [CLS] and [SEP] count")


def _check_plm(config: RunConfig, refuse: Callable[[str, object, str], None]) -> None:
    plm, memory = config.plm, config.memory
    if plm.width % plm.heads:
        refuse("plm.width", plm.width, f"must be a multiple of plm.heads={plm.heads}")
    if plm.init_std <= 0:
        refuse("plm.init_std", plm.init_std, "must be above 0")
    if any(tokens < 8 for tokens in plm.short_rows):
        refuse("plm.short_rows", plm.short_rows, "must be at least 8 tokens each")
    if len(plm.short_updates) != len(plm.short_rows) or any(updates < 1 for updates in plm.short_updates):
        refuse("plm.short_updates", plm.short_updates, f"name one above 0 for each of plm.short_rows={plm.short_rows}")
    if not 0 < plm.mask_share < 1:
        refuse("plm.mask_share", plm.mask_share, "must be above 0 and below 1")
    if config.train.l2_weight:
        refuse("train.l2_weight", config.train.l2_weight, "is a penalty on the keys of a datastore, and there is none")
    if memory.kind == "none":
        return
    if memory.positions != sorted(set(memory.positions)) or not memory.positions:
        refuse("memory.positions", memory.positions, "name layers, counted from 1, rising")
    if memory.fresh_ffn and (memory.kind != "resm" or not plm.init_from):
        refuse("memory.fresh_ffn", True, "belongs to memory.kind=resm with plm.init_from=")
    if memory.key_width % 2:
        refuse("memory.key_width", memory.key_width, "must be even: each half key has half of it")
    if memory.k > memory.sub_keys:
        refuse("memory.k", memory.k, f"must not exceed memory.sub_keys={memory.sub_keys}")


def _check_lengths(config: RunConfig, refuse: Callable[[str, object, str], None]) -> None:
    if config.model.kind in ("plm", "hf"):
        return  # what Hugging Face's model takes is known when its configuration is read
    longest = {
        "train.tokens_per_sample": config.train.tokens_per_sample,
        "datastore.context_window + datastore.block": config.datastore.context_window + config.datastore.block,
        "knn.context_window + knn.block": config.knn.context_window + config.knn.block,
    }
    lstm = config.model.kind == "awd_lstm"
    section, limit = ("lstm", config.lstm.max_positions) if lstm else ("model", config.model.max_positions)
    for key, length in longest.items():
        if length > limit and not (lstm and key == "train.tokens_per_sample"):
            refuse(key, length, f"exceeds {section}.max_positions={limit}")


def _check_grids(config: RunConfig, refuse: Callable[[str, object, str], None]) -> None:
    knn = config.knn
    if not knn.splits:
        refuse("knn.splits", knn.splits, "name at least the split to tune on, e.g. [valid, test]")
    if knn.similarity == "dot" and knn.search == "index" and knn.distances == "quantised":
        refuse("knn.similarity", "dot", "is computed from the true keys; set knn.distances=exact")
    if not knn.ks or not all(1 <= k <= knn.k for k in knn.ks):
        refuse("knn.ks", knn.ks, f"each must be between 1 and knn.k={knn.k}")
    if not knn.lambdas or not all(0 <= weight < 1 for weight in knn.lambdas):
        refuse("knn.lambdas", knn.lambdas, "each must be in [0, 1)")
    if not knn.temperatures or not all(temperature > 0 for temperature in knn.temperatures):
        refuse("knn.temperatures", knn.temperatures, "each must be above 0")


def _check_cache(config: RunConfig, refuse: Callable[[str, object, str], None]) -> None:
    cache = config.cache
    if not cache.windows or cache.windows != sorted(set(cache.windows)) or cache.windows[0] < 1:
        refuse("cache.windows", cache.windows, "must be rising positive numbers of tokens")
    if not cache.thetas or len(set(cache.thetas)) < len(cache.thetas) or not all(theta > 0 for theta in cache.thetas):
        refuse("cache.thetas", cache.thetas, "each must be above 0, and there once")
    if not cache.lambdas or not all(0 <= weight < 1 for weight in cache.lambdas):
        refuse("cache.lambdas", cache.lambdas, "each must be in [0, 1)")


def position_warnings(config: RunConfig) -> list[str]:
    """Settings under which the model would be asked about positions that its training never showed it.

    Sinusoidal positions do not extrapolate: the perplexity rises without any error.
    """
    if config.datastore.checkpoint or config.model.kind != "transformer_lm":
        return []  # trained elsewhere, with a sample length that is not known here; or without positions
    trained = config.train.tokens_per_sample
    lengths = {
        "datastore": config.datastore.context_window + config.datastore.block,
        "knn": config.knn.context_window + config.knn.block,
    }
    return [
        f"warning: {section}.context_window + {section}.block = {length} is longer than train.tokens_per_sample="
        f"{trained}: positions from {trained} on were never trained and will be predicted badly"
        for section, length in lengths.items()
        if length > trained
    ]
