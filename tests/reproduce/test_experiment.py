"""What an experiment consists of."""

import shlex
from pathlib import Path

import pytest
from support.config import run_of

from distlm.config.load import load_config
from distlm.config.training import UpdatesConfig
from distlm.errors import UsageError
from distlm.models.plm.config import PlmRun
from distlm.models.transformer.config import TransformerTraining
from distlm.pipeline import steps_of
from distlm.reproduce.experiment import Experiment, experiment_help, experiment_names, load_experiment
from distlm.runtime.rundir import RunDir


def opened(tmp_path: Path, name: str = "pkm-plm", inputs: tuple[str, ...] = ("books",), **more: object) -> Experiment:
    for key in inputs:
        (tmp_path / key).mkdir(exist_ok=True)
    folders = {key: str(tmp_path / key) for key in inputs}
    return load_experiment(name, tmp_path / "runs", folders, **more)  # type: ignore[arg-type]


NAMES = ("awd-lstm", "causal-pkm", "knnlm", "pkm-plm", "regularized-knnlm")
SCALES = [(name, scale) for name in NAMES for scale in ("small", "paper")]


@pytest.mark.parametrize(("name", "scale"), [*SCALES, ("pkm-plm", "scarce"), ("pkm-plm", "scarce-quick")])
def test_every_command_is_a_valid_one_and_comes_after_what_it_needs(name: str, scale: str, tmp_path: Path) -> None:
    inputs = ("books", "wikitext", "glue", "squad") if name == "pkm-plm" else ("text",)
    experiment = opened(tmp_path, name, inputs, scale=scale)
    seen: set[str] = set()
    for item in experiment.items:
        assert "{" not in " ".join(item.words) and "$" not in " ".join(item.words)
        config = load_config(item.recipe, item.settings)
        assert Path(config.run_dir) == item.folder
        assert seen.issuperset(item.after), item.name
        assert item.name not in seen
        seen.add(item.name)
    assert name in experiment_names() and name in experiment_help()


@pytest.mark.parametrize(
    ("scale", "one", "count"),
    [
        ("small", ("init-resm", "RTE", "frozen"), 4 * (2 + 2 * 2 + 2 * 2)),
        # SQuAD, too.
        ("paper", ("init-resm", "SQuAD", "frozen"), 6 * (2 + 2 * 2 + 2 * 2)),
        ("scarce", ("init-resm-seed2", "SST-2", "updated"), 1 + 4 * 2),
    ],
)
def test_the_folder_of_a_run_takes_what_is_fine_tuned_in_it(
    scale: str, one: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    trained: dict[Path, PlmRun] = {}
    tuned = []
    for item in opened(
        tmp_path, "pkm-plm", ("books", "wikitext", "glue", "squad"), scale=scale, overrides=["train.seed=3"]
    ).items:
        config = run_of(PlmRun, load_config(item.recipe, item.settings))
        if item.verb == "run":
            trained[item.folder] = config
            RunDir(item.folder).open_stage(config, "train")
            RunDir(item.folder).checkpoint(1).mkdir(parents=True)
        elif item.verb == "finetune":
            RunDir(item.folder).refuse_other_config(config, "finetune")
            assert config.plm.init_from == trained[item.folder].plm.init_from
            tuned.append((item.folder.name, config.finetune.task, config.finetune.memory))
    assert one in tuned and len(set(tuned)) == len(tuned) == count


def test_the_scale_of_the_paper_has_the_tasks_of_its_table_4(tmp_path: Path) -> None:
    """With glue= those of GLUE; SQuAD has files of its own."""
    for inputs, more in ((("books", "glue"), set[str]()), (("books", "glue", "squad"), {"SQuAD"})):
        items = opened(tmp_path, inputs=inputs, scale="paper").items
        tuned = [item for item in items if item.verb == "finetune"]
        found = [run_of(PlmRun, load_config(item.recipe, item.settings)).finetune for item in tuned]
        assert {each.task for each in found} == {"SST-2", "CoLA", "MNLI", "QQP", "QNLI"} | more
        assert {Path(each.data_dir).name for each in found if each.task == "SQuAD"} == ({"squad"} if more else set())
        assert all(each.length == 0 and each.seeds == [1, 2, 3, 4, 5] for each in found)


def test_models_and_slots_of_the_scale_where_slots_are_scarce(tmp_path: Path) -> None:
    """Two seeds of five models, each with memory from the dense one of its seed, beside a sweep of PKM alone."""
    items = {item.name: item for item in opened(tmp_path, scale="scarce").items}
    configs = {name: run_of(PlmRun, load_config(item.recipe, item.settings)) for name, item in items.items()}
    sweep = {name: config for name, config in configs.items() if name.startswith("sweep-")}
    for name, config in sweep.items():
        memory = config.memory
        assert name == f"sweep-n{memory.sub_keys}-h{memory.heads}-k{memory.k}" and memory.kind == "pkm"
        assert config.train.updates < configs["pkm"].train.updates
        assert 5 * config.train.warmup_updates < config.train.updates
    assert max(config.memory.sub_keys for config in sweep.values()) == 512
    # One of them has the memory of the long trainings, but for the seed.
    assert configs["pkm"].memory in [config.memory for config in sweep.values()]
    rest = [name for name in configs if name not in sweep and items[name].verb == "run"]
    models = ["dense", "pkm", "resm", "init-pkm", "init-resm"]
    assert sorted(rest) == sorted([*models, *(f"{model}-seed2" for model in models)])
    for model in models[1:]:
        first, second = configs[model], configs[f"{model}-seed2"]
        assert (first.train.seed, second.train.seed) == (1, 2) and first.memory == second.memory
    assert configs["init-resm-seed2"].plm.init_from == str(items["dense-seed2"].folder)


def test_the_ablations_are_those_of_the_page(tmp_path: Path) -> None:
    experiment = opened(tmp_path, "awd-lstm", ("text",))
    page = (Path(__file__).parents[2] / "docs" / "awd-lstm.md").read_text("utf-8")
    base = next(item for item in experiment.items if item.name == "awd-lstm")
    for item in experiment.items:
        own = set(item.settings) - set(base.settings) - {f"name={item.name}", f"run_dir={item.folder}"}
        if item.name not in ("awd-lstm", "words", "tokens") and "-seed" not in item.name:
            assert any(all(f" {word}" in line for word in (f"name={item.name}", *own)) for line in page.splitlines()), (
                own
            )


def test_smaller_datastores_are_of_the_model_that_was_trained_once(tmp_path: Path) -> None:
    found = {item.name: item for item in opened(tmp_path, "knnlm", ("text", "books")).items}
    assert list(found) == ["tokens", "whole", "words-261079", "words-522157", "words-1044314", "domain"]
    for name in list(found)[2:]:
        config = load_config(found[name].recipe, found[name].settings)
        assert config.datastore.checkpoint == str(found["whole"].folder) and found[name].after == ("tokens", "whole")
        assert [step.words for step in steps_of(config)][:2] == ["data prepare", "datastore write"]
        # As many words as all of train has, or fewer; and one curve over k for all.
        assert 0 < config.data.first_words <= 2_088_628
        assert config.knn.ks == load_config(found["whole"].recipe, found["whole"].settings).knn.ks
    assert "domain" not in {item.name for item in opened(tmp_path, "knnlm", ("text",)).items}


def test_a_memory_model_comes_after_the_dense_one_that_it_starts_from(tmp_path: Path) -> None:
    items = {item.name: item for item in opened(tmp_path).items}
    assert items["init-pkm"].after == ("rows", "dense")
    assert f"plm.init_from={tmp_path / 'runs' / 'dense'}" in items["init-pkm"].settings
    assert not any("init_from" in setting for setting in items["pkm"].settings)


def test_what_needs_an_input_that_is_not_given_is_left_out(tmp_path: Path) -> None:
    items = opened(tmp_path).items
    assert [item.verb for item in items] == ["data shard", *["run"] * 7]
    assert not any("wikitext" in word for item in items for word in item.settings)
    whole = opened(tmp_path, inputs=("books", "wikitext", "glue")).items
    assert next(item.name for item in whole if item.verb == "finetune") == "dense-SST-2"
    assert any(
        word == f"plm.texts=[wikitext={tmp_path / 'runs' / 'wikitext-rows'}/shards]" for word in whole[2].settings
    )


def test_only_takes_what_it_needs_with_it(tmp_path: Path) -> None:
    chosen = opened(tmp_path, only=["init-resm"])
    assert [item.name for item in chosen.items] == ["rows", "dense", "init-resm"]


def test_settings_of_the_user_come_last(tmp_path: Path) -> None:
    item = opened(tmp_path, overrides=["train.updates=7"]).items[1]
    assert item.settings[-1] == "train.updates=7"
    assert load_config(item.recipe, item.settings).section(UpdatesConfig).updates == 7


def test_lists_of_the_user_make_the_runs(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    given = {"text": str(tmp_path / "text"), "weights": "[0, 2]", "seeds": "[7]", "queue_weights": "[]"}
    items = load_experiment("regularized-knnlm", tmp_path / "runs", given).items
    assert [item.name for item in items] == ["tokens", "w0-s7", "w2-s7"]
    train = load_config(items[2].recipe, items[2].settings).section(TransformerTraining)
    assert (train.l2_weight, train.seed, train.regulariser) == (2, 7, "l2")
    assert "weights=[0,0.1,1,10] (optional)" in experiment_help()
    for wrong in ("2", "[a]", "[1"):
        with pytest.raises(UsageError, match="expected a list of numbers"):
            load_experiment("regularized-knnlm", tmp_path / "runs", given | {"weights": wrong})


def test_the_sweep_of_the_regularised_model_has_every_weight_and_seed(tmp_path: Path) -> None:
    small = opened(tmp_path, "regularized-knnlm", ("text",)).items
    assert len(small) == 1 + 4 * 3 + 3
    queue = next(item for item in small if item.name == "queue-w0.1-s1")
    train = load_config(queue.recipe, queue.settings).section(TransformerTraining)
    assert (train.l2_weight, train.regulariser, train.seed) == (0.1, "queue", 1)
    grid = load_config(queue.recipe, queue.settings).knn
    assert 0.3 in grid.lambdas and 1.0 in grid.temperatures
    assert len(opened(tmp_path, "regularized-knnlm", ("text",), scale="paper").items) == 1 + 4 * 5 + 3
    overfit = opened(tmp_path, "regularized-knnlm", ("text",), scale="overfit").items
    assert [item.name for item in overfit] == ["words", *(item.name for item in small)]
    for item in overfit[1:]:
        config = load_config(item.recipe, item.settings)
        assert config.data.first_words and 0.3 in config.knn.lambdas and 1.0 in config.knn.temperatures
        # A validation under way would choose a checkpoint from before it overfits.
        assert config.train.valid_every == 0


@pytest.mark.parametrize(("name", "scale"), [("awd-lstm", "small"), ("regularized-knnlm", "overfit")])
def test_words_of_little_text_come_from_all_of_train(name: str, scale: str, tmp_path: Path) -> None:
    words, tokens, *rest = opened(tmp_path, name, ("text",), scale=scale).items
    assert (words.name, tokens.name) == ("words", "tokens")
    of_all, of_few = (load_config(item.recipe, item.settings).data for item in (words, tokens))
    assert of_all.first_words == 0 and of_all.max_words == of_few.max_words > 0 and not of_all.dictionary
    assert of_few.first_words > 0 and of_few.dictionary == str(words.folder / "tokens" / "dict.txt")
    for item in rest:
        config = load_config(item.recipe, item.settings)
        # The token files are refused where the settings that made them differ.
        assert config.data.tokens_dir == str(tokens.folder / "tokens")
        assert {**vars(config.data), "tokens_dir": ""} == vars(of_few)
        assert item.after == ("words", "tokens") and (config.launch.ranks, config.launch.threads) == (1, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "pkm"}, "no experiment 'pkm'; there are awd-lstm, causal-pkm, knnlm, pkm-plm, regularized-knnlm"),
        ({"inputs": ()}, "pkm-plm needs books=FOLDER: text to pretrain on"),
        ({"inputs": ("books", "text")}, "has no input 'text'; it takes books=FOLDER"),
        ({"only": ["pkn"]}, "has no run 'pkn'; there are rows, dense"),
        ({"scale": "large"}, "no scale 'large'; there are small, paper, scarce, scarce-quick"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        opened(tmp_path, **change)  # type: ignore[arg-type]


def test_an_input_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"books=/nowhere: there is no such folder"):
        load_experiment("pkm-plm", tmp_path, {"books": "/nowhere"})


def test_the_command_of_the_record_is_of_all_runs_and_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "wikitext-2").mkdir()
    given = {"seeds": "[1]", "weights": "[0, 0.5]", "text": str(tmp_path / "wikitext-2")}
    overrides = [
        "train.max_updates_this_run=5",
        "train.seed=3",
        "launch.verify=false",
        "plm.texts=[books=/some/where/shards/,other=/else]",
        "index.factory=IVF64,PQ4",
    ]
    made = load_experiment("regularized-knnlm", tmp_path / "runs", given, overrides, ["tokens"], "paper").command
    assert shlex.split(made) == [
        "distlm", "reproduce", "regularized-knnlm", "text=/path/to/wikitext-2", "weights=[0,0.5]", "seeds=[1]",
        "train.seed=3",
        "plm.texts=[books=/path/to/shards,other=/path/to/else]", "index.factory=IVF64,PQ4", "--scale", "paper",
    ]  # fmt: skip
