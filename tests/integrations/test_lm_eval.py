"""The model of lm_eval on tasks of our own, without a network: its numbers are those of knn evaluate and of torch."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support import shared
from support.hf.runs import Made
from support.present import present

from distlm.config.schema import RunConfig
from distlm.data.subwords import FIRST_PIECE
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, UsageError
from distlm.integrations.reading import of_run
from distlm.integrations.text import Pieces
from distlm.knnlm.evaluate.losses import Losses
from distlm.knnlm.tune.records import Tuned
from distlm.runtime.rundir import RunDir

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not here: pip install -e '.[lm-eval]'")

from lm_eval.tasks import TaskManager  # noqa: E402

from distlm.integrations.lm_eval import DistlmModel  # noqa: E402

Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of the package's own transformer over words."""
    return shared.searched(tmp_path_factory)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """(model, name, documents, further lines of the task) → what lm_eval finds."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def evaluate(model: DistlmModel, name: str, documents: list[dict[str, Any]], **more: Any) -> Any:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in documents), "utf-8")
        files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **more}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task), "utf-8")
        return lm_eval.simple_evaluate(
            model=model, tasks=[name], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )  # fmt: skip

    return evaluate


def perplexities(model: DistlmModel, tasks: Callable[..., Any], text: str) -> float:
    """Σ ln p of a text, by lm_eval's word perplexity."""
    found = tasks(
        model, "whole", [{"text": text}], output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    # Its task counts the empty string behind the last newline as a word.
    return -math.log(found["results"]["whole"]["word_perplexity,none"]) * len(re.split(r"\s+", text))


@pytest.mark.parametrize("mixture", ["lm", "knn"])
def test_rolling_likelihoods_are_those_of_knn_evaluate(made: Make, words: RunConfig, mixture: str, tasks: Any) -> None:
    """Of Hugging Face's models and of one over words."""
    runs = [made("gpt2"), made("gemma2")]
    for root, text in (*((run.run, run.split("valid")) for run in runs), (RunDir.of(words), None)):
        text = text or (Path(words.data.text_dir) / "valid.txt").read_text("utf-8")
        nats = Losses.open(root.losses, "valid", mixture).nats
        found = perplexities(DistlmModel(run=str(root.root), mixture=mixture), tasks, text)
        assert found == pytest.approx(-nats.sum(), rel=1e-5)


def test_choices_and_continuations_of_a_knn_lm(made: Make, tasks: Any) -> None:
    """lm_eval's accuracy is that of ln p computed token by token."""
    run = made("llama")
    knn = run.knn().add(run.split("train"), block=32).build_index("Flat")
    knn.mixing = knn.mixed(lam=0.5, temperature=2.0, k=16)
    random = np.random.default_rng(0)
    documents: list[dict[str, Any]] = [
        {"context": f"w{a} w{b}", "choices": [f"w{c}", f"w{d} w{c}"], "answer": int(random.integers(0, 2))}
        for a, b, c, d in random.integers(0, 12, (12, 4)).tolist()
    ]
    model = DistlmModel(knn_lm=knn, batch_size=3)
    found = tasks(
        model, "choose", documents, output_type="multiple_choice", doc_to_text="{{context}}",
        doc_to_choice="choices", doc_to_target="answer", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    right = 0
    for document, sample in zip(documents, found["samples"]["choose"], strict=True):
        scores = []
        for choice, (answered, greedy) in zip(document["choices"], sample["filtered_resps"], strict=True):
            before, whole = (knn.ids(text)[:-1] for text in (document["context"], f"{document['context']} {choice}"))
            one, best = 0.0, True
            for place in range(len(before), len(whole)):
                full = model.scorer.scorer.next_word(whole[:place])
                one += float(full[whole[place]])
                best &= int(full.argmax()) == int(whole[place])
            assert answered == pytest.approx(one, abs=1e-4) and greedy == best
            scores.append(one)
        right += int(np.argmax(scores)) == document["answer"]
    assert found["results"]["choose"]["acc,none"] == pytest.approx(right / len(documents))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_what_a_context_says_counts(made: Make, name: str) -> None:
    """By the model of transformers alone, and with neighbours as log_probs has them."""
    run = made(name)
    knn = run.knn().add(run.split("train"), block=32).build_index("Flat")
    knn.mixing = knn.mixed(lam=0.5, temperature=2.0, k=16)
    text = "w1 w2 w3 w0 w1"
    ids = knn.pieces(knn.ids(text))[:-1]
    cut = len(knn.pieces(knn.ids("w1 w2"))) - 1
    front = knn.lm.config.begin if name == "gemma2" else knn.subwords.line_end
    rows = torch.tensor([[front, *ids.tolist()]])
    with torch.inference_mode():
        logits = knn.model(input_ids=rows).logits[0].log_softmax(1)
    expected = float(logits[torch.arange(cut, len(ids)), ids[cut:]].sum())
    request = type("Request", (), {"args": ("w1 w2 ", "w3 w0 w1")})
    alone = DistlmModel(knn_lm=knn, mixture="lm").loglikelihood([request])[0]
    assert alone[0] == pytest.approx(expected, abs=1e-4)
    both = DistlmModel(knn_lm=knn).loglikelihood([request])[0]
    assert both[0] == pytest.approx(knn.log_probs(text + "\n").mixture[cut : len(ids)].sum(), abs=1e-4)
    nothing = type("Request", (), {"args": ("", "w3")})
    assert DistlmModel(knn_lm=knn).loglikelihood([nothing])[0][0] == pytest.approx(
        knn.log_probs("w3\n").mixture[:-1].sum(), abs=1e-4
    )


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_kept_keys_and_values_give_the_same_text(made: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beyond the longest text that the model is given, where the window moves."""
    scorer = of_run(made(name).run.root, "lm")
    # Special tokens, which a random model draws often, end no text here.
    monkeypatch.setattr(Pieces, "ends", lambda *_: False)
    model: Any = scorer.scorer.model
    lengths: list[int] = []
    hook = model.hf.base_model.register_forward_pre_hook(
        lambda _module, _given, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    kept = scorer.generate("w1 w2", [], 66, 1.0, seed=4)
    hook.remove()
    assert lengths[0] > 1 and lengths[1:40] == [1] * 39 and lengths[-1] == 64
    monkeypatch.setattr(model, "new_past", lambda: None)
    assert kept == scorer.generate("w1 w2", [], 66, 1.0, seed=4)


@pytest.mark.parametrize("mixture", ["knn", "knn_buckets"])
def test_text_goes_on_until_it_should_stop(made: Make, mixture: str, tasks: Any) -> None:
    run = made("gpt2")
    model = DistlmModel(run=str(run.run.root), mixture=mixture)
    scorer = model.scorer.scorer
    ids = model.scorer.codec.encode("w1 w2").tolist()
    for _ in range(9):
        ids.append(int(scorer.next_word(ids).argmax()))
    whole = model.scorer.codec.decode(ids)[len("w1 w2") :]
    assert len(whole) > 6
    stop = whole[4:6]
    found = tasks(
        model, "goes_on", [{"context": "w1 w2"}], output_type="generate_until", doc_to_text="{{context}}",
        doc_to_target="", generation_kwargs={"until": [stop], "max_gen_toks": 9, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    assert found["samples"]["goes_on"][0]["resps"][0][0] == whole[: whole.index(stop)]
    request = type("Request", (), {"args": ("w1 w2", {"until": ["w"], "top_k": 3})})
    with pytest.raises(UsageError, match="generation_kwargs top_k: only until"):
        model.generate_until([request])


def test_words_between_spaces_too(words: RunConfig) -> None:
    """The package's own models: a prefix of a split has the probability of the evaluation."""
    run = RunDir.of(words)
    scorer, ids = of_run(run.root), TokenFiles.open(run.tokens(words)).split("valid")
    text = scorer.codec.decode(ids[:12])
    assert np.array_equal(scorer.codec.encode(text), ids[:12])
    knn = Losses.open(run.losses, "valid", "knn").nats
    assert scorer.log_prob(text) == pytest.approx(-knn[:12].sum(), abs=1e-4)
    first = scorer.codec.decode(ids[:4])
    found = scorer.scorer.continuations([(ids[:4], ids[4:12])])[0][0]
    assert found == pytest.approx(-knn[4:12].sum(), abs=1e-4)
    assert scorer.generate(first, [], 3).split("\n")[0] != "" and scorer.log_prob("") == 0
    assert present(Tuned.read(run.tuned).weight) == scorer.scorer.mixing.lam


def test_what_cannot_be_is_refused(made: Make, tmp_path: Path) -> None:
    run = made("gpt2")
    knn = run.knn()
    for act, said in (
        (lambda: DistlmModel(), "give run= or knn_lm="),
        (lambda: DistlmModel(run="x", knn_lm=knn), "give run= or knn_lm="),
        (lambda: DistlmModel(knn_lm=knn, mixture="gate"), "mixture='gate': choose one of lm, knn, knn_buckets"),
        (lambda: DistlmModel(run=str(run.run.root), mixture="both"), "choose one of lm"),
        (lambda: DistlmModel(knn_lm=knn, mixture="knn"), "call add"),
        (lambda: DistlmModel(run=str(tmp_path / "nothing")), "nothing"),
        (lambda: DistlmModel(knn_lm=knn, settings="knn.k=3"), "those of a run"),
        (lambda: DistlmModel(run=str(run.run.root), settings="knn.similarity=dot"), "only squared L2"),
    ):  # fmt: skip
        with pytest.raises(DistlmError, match=said):
            act()
    knn.model.train()
    with pytest.raises(UsageError, match=r"call model.eval\(\)"):
        DistlmModel(knn_lm=knn)


@pytest.mark.parametrize(
    ("name", "special", "sample"),
    [
        ("gpt2", "<|endoftext|>", False),
        ("gpt2", "<|endoftext|>", True),
        ("llama", "<s>", False),
        ("gemma2", "<bos>", False),
    ],
)
def test_a_generation_ends_at_a_special_token_and_leaves_it_out(
    made: Make, name: str, special: str, sample: bool
) -> None:
    run = made(name)
    model = DistlmModel(run=str(run.run.root), mixture="lm")
    lm: Any = model.scorer.scorer.model
    tokenizer = run.tokenizer()
    word, end = tokenizer.encode("w1", add_special_tokens=False)[0], tokenizer.convert_tokens_to_ids(special)
    steps: list[int] = []

    def answer(_module: Any, _given: Any, logits: torch.Tensor) -> torch.Tensor:
        """Three times the first piece of a word, then the special token for ever."""
        steps.append(word if len(steps) < 3 else end)
        return torch.full_like(logits, -1e4).index_fill(-1, torch.tensor([steps[-1]]), 1e4)

    hook = lm._head.register_forward_hook(answer)
    request = type("Request", (), {"args": ("w2", {"until": ["never"], "do_sample": sample})})
    (text,) = model.generate_until([request])
    hook.remove()
    assert len(steps) == 4 and text and special not in text
    codec = model.scorer.codec
    prompt = codec.encode("w2")
    assert codec.decode(np.append(prompt, [word + FIRST_PIECE] * 3)) == codec.decode(prompt) + text


def test_the_command_line_of_lm_eval(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/integrations.md shows it, with a task of our own."""
    from distlm.integrations.lm_eval import main

    run = made("gpt2")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": run.split("valid")}) + "\n", "utf-8")
    task = {
        "task": "ours", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(task), "utf-8")
    given = f"run={run.run.root},mixture=knn,settings=knn.batch_blocks=2;knn.scan=queries"
    words = ["--model", "distlm", "--model_args", given, "--tasks", "ours", "--include_path", str(tmp_path),
             "--output_path", str(tmp_path / "out.json")]  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.argv", ["lm_eval", *words])
    main()
    found = json.loads(next(tmp_path.glob("out*.json")).read_text("utf-8"))
    assert found["results"]["ours"]["word_perplexity,none"] > 1
