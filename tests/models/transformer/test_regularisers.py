"""Eq. 1 of Ton et al.: the penalty, queues and running means, what ranks exchange, and trainings with them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.train import curve, newest, relative, same_end, tiny_config, tiny_tokens
from torch import Tensor

from distlm.config.load import load_config
from distlm.errors import DistlmError, Stopped, UsageError
from distlm.models.transformer.config import TransformerConfig
from distlm.models.transformer.model import TransformerLM
from distlm.models.transformer.regularisers.encoder import MomentumEncoder
from distlm.models.transformer.regularisers.exchange import UpdateWords, WordExchange
from distlm.models.transformer.regularisers.files import load_table, save_table
from distlm.models.transformer.regularisers.tables import RunningMeans, WordQueues, WordTable
from distlm.runtime.stage import open_stage
from distlm.training.loop import plan_train, run_train
from distlm.training.microbatch import MicroBatchPlan
from distlm.training.objective import TrainModule

CPU = torch.device("cpu")
WIDTH, LENGTH, WORDS = 5, 4, 6
QUEUE = ["train.l2_weight=0.1", "train.regulariser=queue", "train.queue_length=4", "train.encoder_momentum=0.9"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(kind: type[WordTable], length: int = LENGTH, fill: int = 1) -> WordTable:
    return kind(WORDS, WIDTH, length, fill, CPU)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Words, some of them often, word 5 never, and their states."""
    random_words = np.random.default_rng(0)
    found = []
    for seed in range(count):
        words = torch.from_numpy(random_words.choice(5, size=11, p=[0.6, 0.2, 0.1, 0.06, 0.04]))
        found.append((words, random(11, WIDTH, seed=seed) + 3))
    return found


def literal(states: Tensor, queues: list[list[Tensor]], reduction: str) -> Tensor:
    """Eq. 1 written out: Σ_i ‖Q_i − r‖² over the members of each token's queue."""
    gaps = [[(member - state).square() for member in queue] for state, queue in zip(states, queues, strict=True)]
    return torch.stack([sum((getattr(gap, reduction)() for gap in row), torch.zeros(())) for row in gaps])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalty_and_its_gradient_are_those_of_the_sum_over_explicit_queues(reduction: str) -> None:
    held, words = table(WordQueues), torch.tensor([0, 0, 1, 4, 5, 2])
    members: list[list[Tensor]] = [[] for _ in range(WORDS)]
    for names, states in batches(3):
        held.push(names, states)
        for word, state in zip(names.tolist(), states, strict=True):
            members[word] = [*members[word], state][-LENGTH:]
    assert [len(queue) for queue in members] == held.read(torch.arange(WORDS)).members.tolist()
    assert len(members[0]) == LENGTH and not members[5]
    states = random(6, WIDTH, seed=9).requires_grad_()
    wanted = literal(states, [members[word] for word in words.tolist()], reduction)
    found = held.read(words).penalty(states, reduction)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(part.sum(), states)[0] for part in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_zero_queues_of_length_l_give_l_times_eq_2() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(layers=1, width=16, heads=2, ffn_width=16, cutoffs=[20], max_positions=16, dropout=0.0)
    model = TransformerLM(config, 32).eval()
    words = torch.randint(4, 32, (2, 9), generator=torch.Generator().manual_seed(1))
    held = WordQueues(32, 16, 8, 1, CPU)
    held.pushed += 8
    for reduction in ("mean", "sum"):
        gradients, penalties = [], []
        for pull, weight in ((held.read(words[:, 1:].flatten()), 0.5), (None, 8 * 0.5)):
            model.zero_grad()
            module = TrainModule(model, "last_ffn_input", weight, reduction)
            sums = module(words[:, :-1], words[:, 1:], None, pull)
            module.loss(sums, 1 / 16).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            penalties.append(float(sums.penalty.detach()))
        assert penalties[0] == pytest.approx(8 * penalties[1], rel=1e-6) and penalties[1] > 0
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_running_means_are_queues_while_both_hold_the_same_members() -> None:
    """No word has more states than L: then they are equal, however the pushes were cut."""
    queues, means, one_by_one = table(WordQueues, 40), table(RunningMeans, 40), table(RunningMeans, 40)
    for words, states in batches(4):
        queues.push(words, states)
        means.push(words, states)
        for word, state in zip(words, states, strict=True):
            one_by_one.push(word[None], state[None])
    every = torch.arange(WORDS)
    targets = random(WORDS, WIDTH, seed=9).requires_grad_()
    wanted = queues.read(every).penalty(targets, "sum")
    gradient = torch.autograd.grad(wanted.sum(), targets)[0]
    assert int(queues.pushed.max()) > 20 and float(wanted[5].detach()) == 0
    for held in (means, one_by_one):
        found = held.read(every).penalty(targets, "sum")
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), targets)[0], gradient, rtol=1e-5, atol=1e-4)


def test_full_queues_and_running_means_forget_in_their_own_ways() -> None:
    queues, means = table(WordQueues), table(RunningMeans)
    mean, variance, members = torch.zeros(WIDTH), torch.zeros(()), 0
    last: list[Tensor] = []
    for words, states in batches(5):
        queues.push(words, states)
        means.push(words, states)
        for state in states[words == 0]:
            members = min(members + 1, LENGTH)
            gap = state - mean
            mean = mean + gap / members
            variance = (1 - 1 / members) * (variance + gap.square().sum() / members)
            last = [*last, state][-LENGTH:]
    first = torch.zeros(1, dtype=torch.int64)
    one, other = queues.read(first), means.read(first)
    torch.testing.assert_close(one.mean[0], torch.stack(last).mean(0))
    torch.testing.assert_close(other.mean[0], mean)
    torch.testing.assert_close(other.spread[0], LENGTH * variance)
    # What does not change is where the two meet again.
    for held in (queues, means):
        held.push(torch.zeros(100, dtype=torch.int64), random(1, WIDTH, seed=3).expand(100, -1))
    torch.testing.assert_close(queues.read(first).mean, means.read(first).mean)
    assert float(means.read(first).spread) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", [WordQueues, RunningMeans])
def test_a_word_counts_once_its_queue_is_filled(kind: type[WordTable]) -> None:
    held = table(kind, fill=3)
    for count in range(5):
        pull = held.read(torch.tensor([1, 2]))
        assert pull.members.tolist() == [count if count >= 3 else 0, 0]
        assert (float(pull.spread[0]) > 0) == (count >= 3)
        held.push(torch.tensor([1]), random(1, WIDTH, seed=count))
    assert float(held.read(torch.tensor([2, 2])).penalty(random(2, WIDTH), "sum").sum()) == 0


def test_the_encoder_starts_as_the_model_and_follows_it() -> None:
    torch.manual_seed(0)
    model = TransformerLM(TransformerConfig(layers=1, width=8, heads=2, ffn_width=8, cutoffs=[8], max_positions=8), 16)
    before = torch.random.get_rng_state()
    encoder = MomentumEncoder(model, "last_ffn_input", 0.75, CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    inputs = torch.arange(8)[None]
    assert torch.equal(encoder.states(inputs, None), model.eval()(inputs, tap="last_ffn_input").tapped[0])
    old = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    encoder.follow(dict(model.named_parameters()))
    for name, value in encoder.model.named_parameters():
        torch.testing.assert_close(value, old[name] + 0.25)


def test_every_word_of_an_update_has_one_owner_and_comes_in_order() -> None:
    """What ranks send each other, worked out for three ranks without starting them."""
    blocks = [np.array(words) for words in ([7, 3, 7], [4], [5, 7], [3, 3, 8], [4, 7], [6])]
    words = UpdateWords.of(blocks, MicroBatchPlan(1, 6, 3))
    assert words.of_micro(3).tolist() == [3, 3, 8]
    assert words.wanted(0).tolist() == [3, 7, 8] and words.at(1).tolist() == [3, 9, 10]
    assert sorted(place for rank in range(3) for place in words.at(rank)) == list(range(12))
    larger = UpdateWords.of(blocks, MicroBatchPlan(2, 3, 1))
    assert np.array_equal(larger.words, words.words) and larger.of_micro(1).tolist() == [5, 7, 3, 3, 8]
    exchange = WordExchange(0, 1, CPU)
    states = random(12, 2)
    rows, found = exchange.deliver(larger, states)
    assert rows.tolist() == larger.words.tolist() and torch.equal(found, states)
    fetched = exchange.fetch(larger, lambda rows: rows[:, None].float())
    assert fetched[:, 0].tolist() == [3, 4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokens(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def trained(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """NAME, settings → the folder of a training with explicit queues, run once."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str) -> Path:
        if not (root / name).exists():
            train(tokens, root / name, *QUEUE, *overrides)
        return root / name

    return run


def train(tokens: Path, folder: Path, *overrides: str) -> None:
    with open_stage("train", tiny_config(tokens, folder, *overrides)) as stage:
        run_train(stage)


def same_tables(one: Path, other: Path) -> bool:
    files = ("encoder.safetensors", "words-00000-of-00001.safetensors")
    return all((newest(one) / name).read_bytes() == (newest(other) / name).read_bytes() for name in files)


def test_a_stopped_training_ends_as_a_straight_one(trained: Callable[..., Path], tokens: Path, tmp_path: Path) -> None:
    whole = trained("whole")
    with pytest.raises(Stopped):
        train(tokens, tmp_path / "cut", *QUEUE, "train.max_updates_this_run=5")
    train(tokens, tmp_path / "cut", *QUEUE)
    assert same_end(whole, tmp_path / "cut") and same_tables(whole, tmp_path / "cut")
    assert curve(whole, "train/l2_penalty") == curve(tmp_path / "cut", "train/l2_penalty")
    # The first update's queues are empty.
    penalties = list(curve(whole, "train/l2_penalty").values())
    assert penalties[0] == 0 and min(penalties[1:]) > 0
    assert curve(whole, "train/tap_norm")[1] == pytest.approx(32**0.5, rel=1e-3)


def test_states_of_a_word_come_closer(trained: Callable[..., Path]) -> None:
    weak, strong = trained("weak", "train.l2_weight=1e-6"), trained("strong", "train.l2_weight=1")
    ends = [curve(run, "train/l2_penalty")[12] for run in (strong, weak)]
    assert ends[0] < 0.8 * ends[1]


def test_micro_batches_do_not_decide(trained: Callable[..., Path]) -> None:
    """Without dropout, whose masks belong to micro-batches. Measured: 3e-7."""
    plain = ["model.dropout=0", "model.attention_dropout=0", "model.softmax_dropout=0"]
    one, two = trained("plain", *plain), trained("larger", *plain, "train.micro_blocks=2")
    for name in ("train/loss", "train/l2_penalty"):
        found = [{step: value for step, value in curve(run, name).items() if step > 1} for run in (one, two)]
        assert relative(*found) < 1e-5


def test_weight_zero_is_plain_training_whatever_the_regulariser(tokens: Path, tmp_path: Path) -> None:
    train(tokens, tmp_path / "plain")
    train(tokens, tmp_path / "zero", *QUEUE, "train.l2_weight=0")
    assert same_end(tmp_path / "plain", tmp_path / "zero")
    assert not list(newest(tmp_path / "zero").glob("words-*"))


def test_running_means_train_as_queues_that_never_overflow(tokens: Path, tmp_path: Path) -> None:
    """No word has more than 4300 tokens in all. Measured: 2e-7."""
    for name in ("queue", "mean"):
        extra = (f"train.regulariser={name}", "train.queue_length=4300", "train.l2_weight=1e-4", "train.updates=6")
        train(tokens, tmp_path / name, *QUEUE, *extra, "train.save_every=0")
    for name in ("train/loss", "train/l2_penalty"):
        one, other = (
            {step: value for step, value in curve(tmp_path / run, name).items() if step > 1}
            for run in ("queue", "mean")
        )
        assert relative(one, other) < 1e-4


def test_fp16_trains_as_fp32_with_queues_in_fp32(trained: Callable[..., Path]) -> None:
    """Measured: 4e-4."""
    nag = ["train.optimizer=nag", "train.lr=0.1", "train.blocks_per_update=16", "train.updates=4"]
    half, full = trained("fp16", *nag, "train.precision=fp16"), trained("fp32", *nag)
    for name in ("train/loss", "train/l2_penalty"):
        found = [{step: value for step, value in curve(run, name).items() if step > 1} for run in (full, half)]
        assert relative(*found) < 5e-3
    held = load_file(newest(half) / "words-00000-of-00001.safetensors")
    assert held["queues"].dtype == torch.float32


@pytest.mark.parametrize("stage", ["zero0", "zero2"])
def test_the_encoder_follows_the_weights_that_deepspeed_steps(tokens: Path, tmp_path: Path, stage: str) -> None:
    short = ["train.updates=2", "train.valid_every=0", f"train.deepspeed={stage}"]
    for momentum in ("0", "0.5"):
        train(tokens, tmp_path / momentum, *QUEUE, *short, f"train.encoder_momentum={momentum}")
    held = [load_file(newest(tmp_path / "0") / f"{name}.safetensors") for name in ("encoder", "model")]
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[1])
    held = [load_file(newest(tmp_path / "0.5") / f"{name}.safetensors") for name in ("encoder", "model")]
    assert not torch.equal(held[0]["layers.0.fc1.weight"], held[1]["layers.0.fc1.weight"])


def test_missing_queues_are_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    whole = newest(trained("whole"))
    held = WordQueues(64, 32, 4, 1, CPU)
    load_table(held, whole, 0, 1)
    assert int(held.pushed.sum()) > 11 * 4 * 64
    shutil.copy(whole / "words-00000-of-00001.safetensors", tmp_path / "words-00000-of-00002.safetensors")
    with pytest.raises(DistlmError, match="queues of the words of 1 ranks, of 2 that wrote them; copy the whole"):
        load_table(held, tmp_path, 0, 1)


def test_tables_of_any_rank_count_are_read(trained: Callable[..., Path], tmp_path: Path) -> None:
    whole = load_file(newest(trained("whole")) / "words-00000-of-00001.safetensors")
    words, length, width = whole["queues"].shape
    for writer in range(3):
        part = WordQueues(len(range(writer, words, 3)), width, length, 1, CPU)
        load_table(part, newest(trained("whole")), writer, 3)
        assert torch.equal(part.queues, whole["queues"][writer::3])
        save_table(part, tmp_path, writer, 3)
    for reader in range(2):
        part = WordQueues(len(range(reader, words, 2)), width, length, 1, CPU)
        load_table(part, tmp_path, reader, 2)
        assert torch.equal(part.queues, whole["queues"][reader::2])
        assert torch.equal(part.pushed, whole["pushed"][reader::2])
    with pytest.raises(DistlmError, match=r"queues is \[\d+, 4, 32\], and at least \[\d+, 5, 32\] is expected"):
        load_table(WordQueues(words, width, 5, 1, CPU), tmp_path, 0, 1)


def test_the_plan_says_what_queues_take(tokens: Path, tmp_path: Path) -> None:
    plain = plan_train(tiny_config(tokens, tmp_path / "run", "train.l2_weight=0.1"), 2)
    queues = plan_train(tiny_config(tokens, tmp_path / "run", *QUEUE), 2)
    encoder, vocabulary = 19344 * 4, 64
    note = next(note for note in queues.notes if "train.regulariser" in note)
    assert f"{vocabulary} words x 4 x 32 x 4 bytes / 2 ranks" in note
    table_size = vocabulary // 2 * (4 * 32 * 4 + 8)
    assert queues.memory_bytes - plain.memory_bytes == table_size + encoder
    assert queues.disk_bytes - plain.disk_bytes == 4 * (2 * table_size + encoder)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.queue_length=0"], "train.queue_length=0: must be at least 1"),
        (["train.queue_fill=5", "train.queue_length=4"], "must be between 1 and train.queue_length=4"),
        (["train.encoder_momentum=1.0"], "train.encoder_momentum=1.0: must be in"),
        (["train.regulariser=moco"], "expected one of l2, queue, mean"),
    ],
)
def test_wrong_settings_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_config("demo", overrides)


def test_sharded_weights_are_refused(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match=r"ZeRO stage 3 shards the weights.*set train.deepspeed=zero2"):
        train(tokens, tmp_path / "run", *QUEUE, "train.deepspeed=zero3")
