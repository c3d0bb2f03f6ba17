"""Importing checkpoints of fairseq: the same log-probabilities as the model they are of, or refused."""

import argparse
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.config import run_of
from support.foreign.fairseq import EDGES, HEADS, WIDTH, fairseq_model, write_checkpoint
from support.store import arguments, ready_run, tiny_config
from torch import Tensor

from distlm.cli import main
from distlm.config.schema import RunConfig
from distlm.data.prepare import run_prepare
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.io import load_model
from distlm.models.transformer.config import TransformerRun
from distlm.models.transformer.importer import import_fairseq
from distlm.runtime.stage import open_stage
from distlm.training.loop import run_train


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Token files over 64 words, to be shared by data.tokens_dir."""
    return ready_run(tmp_path_factory.mktemp("fairseq"), lines=200)


def config_of(prepared: RunConfig, run: Path, *extra: str) -> TransformerRun:
    return run_of(TransformerRun, tiny_config(run, Path(prepared.data.text_dir), [tokens_of(prepared), *extra]))


def tokens_of(prepared: RunConfig) -> str:
    return f"data.tokens_dir={Path(prepared.run_dir) / 'tokens'}"


def log_probs_by_hand(state: dict[str, Tensor], words: Tensor) -> Tensor:
    """log p of every word [T, V] after each of `words` [T], in fp64 under fairseq's names, as its paper describes."""
    w = {name.removeprefix("decoder."): value.double() for name, value in state.items()}
    embeddings = [w[f"embed_tokens.embeddings.{band}.0.weight"] for band in range(3)]
    projections = [w[f"embed_tokens.embeddings.{band}.1.weight"] for band in range(3)]
    table = torch.cat([table @ up.T for table, up in zip(embeddings, projections, strict=True)])
    half = WIDTH // 2
    angles = torch.outer(torch.arange(2, 2 + len(words)).double(),
                         torch.exp(torch.arange(half).double() * -math.log(10000) / (half - 1)))  # fmt: skip
    x = math.sqrt(WIDTH) * table[words] + torch.cat([angles.sin(), angles.cos()], dim=1)
    later = torch.ones(len(words), len(words)).triu(1).bool()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for layer in (f"layers.{number}." for number in range(2)):
        normed = norm(x, f"{layer}self_attn_layer_norm")
        if f"{layer}self_attn.in_proj_weight" in w:
            together = normed @ w[f"{layer}self_attn.in_proj_weight"].T + w[f"{layer}self_attn.in_proj_bias"]
            q, k, v = together.chunk(3, dim=1)
        else:
            q, k, v = (linear(normed, f"{layer}self_attn.{part}_proj") for part in "qkv")
        size = WIDTH // HEADS
        heads = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
        scores = [(q[:, h] @ k[:, h].T / math.sqrt(size)).masked_fill(later, -math.inf) for h in heads]
        mixed = torch.cat([score.softmax(1) @ v[:, h] for score, h in zip(scores, heads, strict=True)], dim=1)
        x = x + linear(mixed, f"{layer}self_attn.out_proj")
        inner = linear(norm(x, f"{layer}final_layer_norm"), f"{layer}fc1").relu()
        x = x + linear(inner, f"{layer}fc2")
    head = (x @ torch.cat([embeddings[0], w["adaptive_softmax.head.class_proj.weight"]]).T).log_softmax(1)
    parts = [head[:, : EDGES[1]]]
    for tail in (1, 2):
        within = ((x @ projections[tail]) @ embeddings[tail].T).log_softmax(1)
        parts.append(head[:, EDGES[1] + tail - 1, None] + within)
    return torch.cat(parts, dim=1)


def test_log_probabilities_are_those_of_the_checkpoint(prepared: RunConfig, tmp_path: Path) -> None:
    dictionary = TokenFiles.open(Path(prepared.run_dir) / "tokens").dictionary
    words = torch.tensor([2, 5, 17, 41, 63, 20, 19, 3, 40, 2])
    for joined in (False, True):
        state = fairseq_model(len(dictionary), joined)
        path = write_checkpoint(tmp_path / "checkpoint_best.pt", state)
        config = config_of(prepared, tmp_path / f"run-{joined}")
        summary: dict[str, Any] = import_fairseq(config, path, Path(prepared.run_dir) / "tokens" / "dict.txt")
        model = load_model(Path(summary["checkpoint"]))[0]
        with torch.no_grad():
            hidden = model(words[None]).hidden
            assert hidden is not None
            found = model.full_log_probs(hidden[0])
        expected = log_probs_by_hand(state, words)
        assert torch.allclose(expected.exp().sum(1), torch.ones(len(words)).double())
        assert float((found - expected).abs().max()) < 1e-5
        assert summary["valid_ppl"] == pytest.approx(math.exp(summary["valid_loss"]))


def test_the_command_and_training_that_goes_on(prepared: RunConfig, tmp_path: Path, capsys: Any) -> None:
    words = Path(prepared.run_dir) / "tokens" / "dict.txt"
    path = write_checkpoint(tmp_path / "model.pt", fairseq_model(64))
    given = arguments(tmp_path / "run", Path(prepared.data.text_dir), [tokens_of(prepared), "train.updates=2"])
    with pytest.raises(SystemExit) as end:
        main(["import", "fairseq", *given, "--weights", str(path), "--dictionary", str(words)])
    assert end.value.code == 0 and "valid_ppl=" in capsys.readouterr().out
    config = config_of(prepared, tmp_path / "run", "train.updates=2")
    with open_stage("train", config) as stage:
        assert run_train(stage)["step"] == 2
    assert json.loads((tmp_path / "run/checkpoints/step-00000002/state.json").read_text("utf-8"))["update"] == 2
    with pytest.raises(DistlmError, match="there are checkpoints already"):
        import_fairseq(config, path, words)


def test_a_dictionary_of_another_order_is_refused_and_can_be_used(prepared: RunConfig, tmp_path: Path) -> None:
    lines = (Path(prepared.run_dir) / "tokens" / "dict.txt").read_text("utf-8").splitlines()
    lines[3], lines[4] = lines[4], lines[3]
    other = tmp_path / "dict.txt"
    other.write_text("\n".join(lines) + "\n", "utf-8")
    path = write_checkpoint(tmp_path / "model.pt", fairseq_model(64))
    theirs, ours = lines[3].split()[0], lines[4].split()[0]
    with pytest.raises(
        DistlmError, match=f"id 7 is '{theirs}' there and '{ours}' in the token files.*data.dictionary="
    ):
        import_fairseq(config_of(prepared, tmp_path / "run"), path, other)
    settings = [f"data.dictionary={other}"]
    config = run_of(TransformerRun, tiny_config(tmp_path / "run", Path(prepared.data.text_dir), settings))
    with open_stage("prepare", config) as stage:
        run_prepare(stage)
    assert TokenFiles.open(tmp_path / "run" / "tokens").dictionary.words[7] == theirs
    summary: dict[str, Any] = import_fairseq(config, path, other)
    assert summary["valid_loss"] > 0
    with pytest.raises(DistlmError, match=r"63 words with the four special ones, .* has 64"):
        other.write_text("\n".join(lines[:-1]) + "\n", "utf-8")
        import_fairseq(config_of(prepared, tmp_path / "again"), path, other)


class Pickled:
    """Stands for a class of fairseq."""


def refusals() -> list[tuple[dict[str, Tensor], dict[str, Any], str]]:
    good = fairseq_model(64)
    name = "decoder.adaptive_softmax.tail.0.0.weight"
    return [
        (good, {"task": Pickled()}, r"holds pickled objects of \S*Pickled, which run code"),
        ({**good, name: good[name] + 1}, {}, r"tail.0.0.weight is not that of the input; only .*--tie-adaptive-proj"),
        ({**good, "decoder.layer_norm.weight": torch.ones(WIDTH)}, {}, r"decoder.layer_norm.weight is no part of"),
        ({"decoder.version": torch.zeros(1)}, {}, "no embedding_0 in it"),
        (good, {"model": None}, "not a checkpoint of fairseq"),
        (good, {"args": argparse.Namespace(decoder_attention_heads=4)}, "than model.heads=2; import .* model.heads=4"),
        (good, {"args": None, "cfg": {"model": {"decoder_attention_heads": 8}}}, "import it with model.heads=8"),
        ({k: v for k, v in good.items() if "fc2.bias" not in k}, {}, "layers.0.fc2.bias .* is missing"),
    ]


def test_what_is_not_such_a_model_is_refused(prepared: RunConfig, tmp_path: Path) -> None:
    words = Path(prepared.run_dir) / "tokens" / "dict.txt"
    path, config = tmp_path / "checkpoint.pt", config_of(prepared, tmp_path / "run")
    for state, more, said in refusals():
        write_checkpoint(path, state, **more)
        with pytest.raises(DistlmError, match=said):
            import_fairseq(config, path, words)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(DistlmError, match=r"checkpoint\.pt: is text; --weights takes"):
        import_fairseq(config, path, words)
    state = fairseq_model(64)
    state["decoder.layers.0.fc1.bias"] = torch.full_like(state["decoder.layers.0.fc1.bias"], float("inf"))
    write_checkpoint(path, state)
    with pytest.raises(
        DistlmError, match=r"checkpoint\.pt: (\d+) of \1 numbers of layers.0.fc1.bias are NaN or infinite"
    ):
        import_fairseq(config, path, words)
    write_checkpoint(path, fairseq_model(64))
    other = config_of(prepared, tmp_path / "run", "model.layers=3", "model.cutoffs=[10,40]")
    with pytest.raises(DistlmError, match=r"import it with model.layers=2 model.cutoffs=\[20,40\]"):
        import_fairseq(other, path, words)
    with pytest.raises(DistlmError, match=r"no such file; give the dict\.txt"):
        import_fairseq(config, path, tmp_path / "dict.txt")
    assert not list((tmp_path / "run").rglob("step-*")), "nothing half-written"


def test_the_trainers_meters_are_no_obstacle(prepared: RunConfig, tmp_path: Path, monkeypatch: Any) -> None:
    """fairseq's trainer stores its meters, objects of fairseq.meters."""
    module = types.ModuleType("fairseq.meters")
    meter = type("AverageMeter", (), {"__module__": "fairseq.meters"})
    module.AverageMeter = meter  # type: ignore[attr-defined]
    for name in ("fairseq", "fairseq.meters"):
        monkeypatch.setitem(sys.modules, name, module)
    meters = {"train_loss": meter()}
    meters["train_loss"].val = 3.5
    path = write_checkpoint(tmp_path / "checkpoint.pt", fairseq_model(64), extra_state={"train_meters": meters})
    monkeypatch.undo()
    words = Path(prepared.run_dir) / "tokens" / "dict.txt"
    summary: dict[str, Any] = import_fairseq(config_of(prepared, tmp_path / "run"), path, words)
    assert summary["valid_loss"] > 0
