"""What training an AWD-LSTM will need: updates, tokens, disk, memory, time."""

import torch

from distlm.models.awd_lstm.config import LstmRun
from distlm.models.awd_lstm.job import plan_columns, refuse_zero_stage
from distlm.models.awd_lstm.model import FIRST_ID
from distlm.models.awd_lstm.phases import finetune_epochs
from distlm.models.described import parameter_count, require_tap
from distlm.models.linear_cross_entropy import chunk_rows
from distlm.runtime.plan import StagePlan, rank_flops
from distlm.training.blocks.plan import Corpus
from distlm.training.dsconfig import load_ds_config, zero_stage


def plan_lstm(config: LstmRun, ranks: int) -> StagePlan:
    """Needs of training at a rank count; fine-tuning may end sooner than is counted here.

    Time counts 6 FLOP per parameter (the tied matrix once) and token at this machine's CPU rate: on a GPU an upper
    bound. Memory holds weights, gradients and averages, and the longest chunk: per token and column the layers' gates
    and states, and once the rows of the softmax that are computed at a time. Raises DistlmError as LstmJob.open.
    """
    train, awd, lstm = config.train, config.awd, config.lstm
    micro = plan_columns(awd, ranks)
    deepspeed = load_ds_config(train.deepspeed)
    refuse_zero_stage(train, deepspeed)
    stage = zero_stage(deepspeed)
    notes = []
    corpus = Corpus.of(config)
    vocabulary = corpus.vocabulary
    require_tap(lstm, train.tap, "train.tap")
    if not corpus.exact:
        notes.append(f"no token files yet: a vocabulary of {vocabulary} is assumed")
    parameters = parameter_count(lstm, vocabulary)
    epochs = awd.epochs + finetune_epochs(awd)
    weights = 4 * parameters
    # The weights, their averages and the hidden states of each column.
    states = 8 * awd.batch * (lstm.hidden_width * (lstm.layers - 1) + lstm.width)
    disk = (2 * weights + states) * (train.keep_last + 2)
    # A draw of 8 deviations is the longest there can be.
    longest = awd.bptt + 41 if awd.variable_length else awd.bptt
    inner = lstm.hidden_width * (lstm.layers - 1) + lstm.width
    activations = 4 * longest * micro.micro_blocks * (8 * inner + 6 * lstm.width)
    softmax = 4 * chunk_rows(vocabulary - FIRST_ID, torch.device("cpu")) * vocabulary
    # Gradients, dropped weights, and the copy while averages are swapped in or a checkpoint is gathered.
    resident = weights * 4 + weights // (ranks if stage else 1) * (2 if stage else 1)
    # Each epoch is validated: a forward pass, a third of the work.
    flops = epochs * (corpus.tokens + corpus.valid / 3) * 6.0 * parameters
    seconds = flops / (rank_flops(config.launch.threads, ranks) * ranks) if corpus.tokens else None
    if corpus.tokens:
        notes.append(f"one epoch: {corpus.tokens} tokens; epochs after the trigger of fine-tuning are not run")
    return StagePlan(
        "train",
        f"at most {awd.epochs} + {finetune_epochs(awd)} epochs of {awd.batch} columns x about {awd.bptt} tokens, "
        f"{parameters / 1e6:.1f} M parameters, {micro.accumulation} micro-batches per rank and update, ZeRO {stage}",
        disk,
        resident + activations + softmax,
        seconds,
        notes,
    )
