"""What training will need: updates, tokens, disk, memory, time."""

from pathlib import Path

from distlm.config.schema import ModelConfig, RunConfig
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.awd_lstm.plan import plan_lstm
from distlm.models.hf.model import HfModel
from distlm.models.kinds import model_config, parameter_count
from distlm.models.plm.plan import plan_plm
from distlm.models.transformer.regularisers.tables import table_bytes, uses_queues
from distlm.runtime.files import format_bytes
from distlm.runtime.plan import StagePlan, machine_flops
from distlm.runtime.rundir import RunDir
from distlm.training.dsconfig import load_ds_config, zero_stage
from distlm.training.memory_need import states_bytes
from distlm.training.microbatch import plan_micro_batches


def plan_train(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of training at a rank count.

    Time counts 6 FLOP per parameter and token (Kaplan et al. 2020) plus attention, and 6·D·c for the c softmax
    classes a token's target is scored against; the rate is this machine's CPU, so on a GPU it is an upper bound.
    Raises DistlmError for a batch that does not divide over the ranks and for a bad train.deepspeed.
    """
    if config.model.kind == "awd_lstm":
        return plan_lstm(config, ranks)
    if config.model.kind == "plm":
        return plan_plm(config, ranks)
    train, model = config.train, model_config(config)
    assert isinstance(model, ModelConfig | HfModel)
    micro = plan_micro_batches(train, ranks)
    stage = zero_stage(load_ds_config(train.deepspeed))
    notes = []
    try:
        tokens = TokenFiles.open(RunDir(Path(config.run_dir)).tokens(config))
        vocabulary, corpus = len(tokens.dictionary), tokens.meta.splits["train"].tokens
    except DistlmError:
        vocabulary, corpus = config.data.max_words or 4 * max(config.model.cutoffs, default=12500), 0
        if not isinstance(model, HfModel):
            notes.append(f"no token files yet: a vocabulary of {vocabulary} is assumed")
    parameters = parameter_count(model, vocabulary)
    seen = train.updates * train.blocks_per_update * train.tokens_per_sample
    if corpus:
        notes.append(f"{seen / corpus:.1f} passes over {corpus} tokens")
    states = 2 if train.optimizer == "adam" else 1
    tables = encoder = 0
    if uses_queues(train):
        tables = table_bytes(train.regulariser, vocabulary, model.width, train.queue_length, ranks)
        encoder = 4 * parameters
        form = f"{train.queue_length} x " if train.regulariser == "queue" else ""
        notes.append(
            f"train.regulariser={train.regulariser}: {vocabulary} words x {form}{model.width} x 4 bytes / {ranks} "
            f"ranks = {format_bytes(tables)} a rank, and a momentum encoder of {format_bytes(encoder)} on every rank; "
            "one more forward pass"
        )
    checkpoint = 4 * parameters * (1 + states) + tables * ranks + encoder
    # One more while the newest is written, one for the best.
    disk = checkpoint * (train.keep_last + 2)
    if isinstance(model, HfModel):
        # The layers are counted by what they hold; a tied softmax is counted once.
        layers = max(1, round((parameters - model.rows * model.width) / (12 * model.width**2)))
        inner, head, per_token = 4 * model.width, model.rows, 6 * parameters
    else:
        layers, inner = model.layers, model.ffn_width
        head = min([edge for edge in model.cutoffs if edge < vocabulary] or [vocabulary])
        per_token = 6 * ((4 * model.width**2 + 2 * model.width * inner) * layers + model.width * head)
    per_token += 6 * layers * train.tokens_per_sample * model.width
    # The encoder's forward pass is a third of forward and backward.
    seconds = seen * per_token * (4 / 3 if encoder else 1) / (machine_flops() * ranks)
    memory = states_bytes(parameters, states, train.precision != "fp32", stage, ranks) + tables + encoder
    activations = train.micro_blocks * train.tokens_per_sample * (layers * (10 * model.width + 2 * inner) + 3 * head)
    if train.precision == "fp16":
        notes.append("fp16 with loss scaling: the way on V100, which has no bf16")
    return StagePlan(
        "train",
        f"{train.updates} updates of {train.blocks_per_update} blocks x {train.tokens_per_sample} tokens "
        f"({seen / 1e6:.1f} M tokens), {parameters / 1e6:.1f} M parameters, {micro.accumulation} micro-batches per "
        f"rank and update, ZeRO {stage}",
        disk,
        memory + max(4 * activations, 4 * parameters * states),  # a save holds one kind of tensor on rank 0
        seconds,
        notes,
    )
