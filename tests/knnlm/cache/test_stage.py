"""The stage `distlm knn cache`: its files, tuning and evaluation with it, its mixtures, and what it refuses."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.knn import copy_run, in_stage, one_writer_at_a_time
from support.knn.cache import per_token
from support.records import alter
from support.store import file_hashes

from distlm.config import load_config
from distlm.config.schema import CacheConfig
from distlm.datastore.writer import run_datastore_write
from distlm.errors import DistlmError, UsageError
from distlm.index import run_index_build
from distlm.knnlm.cache import stage as cache_run
from distlm.knnlm.cache.files import Cache, check_windows
from distlm.knnlm.cache.plan import plan_cache
from distlm.knnlm.cache.scores import add_cache
from distlm.knnlm.cache.stage import run_cache
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.stage import run_evaluate
from distlm.knnlm.evaluate.state import cached_as_configured, evaluated_as_tuned, tuned_as_configured
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.search.states import States
from distlm.knnlm.tune.stage import run_tune
from distlm.pipeline import plan_pipeline
from distlm.runtime.rundir import RunDir

CACHE = ["cache.windows=[5,60]", "cache.thetas=[0.01,0.1]", "cache.lambdas=[0.0,0.1,0.3]"]


@pytest.fixture(scope="session")
def cached(searched, tmp_path_factory):
    """Neighbours and cache, tuned and evaluated together; read only."""
    config = copy_run(searched, tmp_path_factory.mktemp("cached") / "run", *CACHE)
    for function in (run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    return config


@pytest.fixture(scope="session")
def cache_alone(indexed, tmp_path_factory):
    """A model with a cache, without datastore and neighbours; read only."""
    config = copy_run(indexed, tmp_path_factory.mktemp("alone") / "run", *CACHE)
    run = RunDir.of(config)
    shutil.rmtree(run.datastore)
    shutil.rmtree(run.index)
    for function in (run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    return config


def opened(config):
    run = RunDir.of(config)
    return run, json.loads(run.tuned.read_text()), json.loads(run.results.read_text())


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_stage_gives_the_direct_perplexity(cached, split):
    run, tuned, results = opened(cached)
    neighbours = Neighbours.open(run.neighbours(split))
    states = np.concatenate([np.asarray(unit.queries) for unit in neighbours.units()])
    words = np.concatenate([np.asarray(unit.targets) for unit in neighbours.units()])
    own = tuned["cache"]
    assert own["lambda"] > 0
    log_cache = per_token(states, words, own["window"], own["theta"], "full")
    p_lm = np.exp(neighbours.log_probs())
    p = np.where(np.isnan(log_cache), p_lm, (1 - own["lambda"]) * p_lm + own["lambda"] * np.exp(log_cache))
    direct = math.exp(-math.fsum(np.log(p)) / len(p))
    figures = results["splits"][split]
    assert figures["cache"]["perplexity"] == pytest.approx(direct, abs=1e-6)
    assert figures["cached"] == pytest.approx(1 - (own["window"] + 1) / len(p))


def test_all_four_are_in_results_table_and_tuning(cached):
    _, tuned, results = opened(cached)
    valid = results["splits"]["valid"]
    assert valid["cache"]["perplexity"] == tuned["cache"]["perplexity"]
    assert valid["both"]["perplexity"] == tuned["both"]["perplexity"]
    assert valid["knn"]["perplexity"] == tuned["perplexity"]
    assert tuned["both"]["loss_nats"] <= min(tuned["loss_nats"], tuned["cache"]["loss_nats"])
    assert results["settings"]["cache"]["fill"] == "full"
    assert results["settings"]["both"] == {name: tuned["both"][name] for name in ("knn_lambda", "cache_lambda")}
    table = results_table(Results.read(RunDir(Path(cached.run_dir)).results))
    for line in ("LM ", "+ cache ", "+ kNN ", "+ kNN + cache", "none until the window is full"):
        assert line in table
    losses = np.array(tuned["cache"]["grid"]["loss_nats"])
    assert losses.shape == (2, 2, 3)
    assert losses.min() == tuned["cache"]["loss_nats"]
    np.testing.assert_array_equal(losses[:, :, 0], tuned["lm_loss_nats"])


def test_per_token_losses_are_kept_and_add_up(cached):
    run, _, results = opened(cached)
    for split, figures in results["splits"].items():
        for name in ("lm", "cache", "knn", "both"):
            nats = np.load(run.losses / split / f"{name}.npy")
            assert mean_loss(-nats) == figures[name]["loss_nats"]
        targets = np.load(run.losses / split / "targets.npy")
        np.testing.assert_array_equal(targets, States.open(run.neighbours(split)).targets())


@pytest.mark.parametrize(
    ("extra", "equal"),
    [
        (["cache.lambdas=[0.0]"], {"cache": "lm", "both": "knn"}),
        (["knn.lambdas=[0.0]"], {"knn": "lm", "both": "cache"}),
        (["cache.lambdas=[0.0]", "knn.lambdas=[0.0]"], {"cache": "lm", "knn": "lm", "both": "lm"}),
    ],
)
def test_a_weight_of_zero_leaves_the_rest_exactly(cached, tmp_path, extra, equal):
    config = copy_run(cached, tmp_path / "run", *CACHE, *extra)
    for function in (run_tune, run_evaluate):
        in_stage("knn", config, function)
    run, _, results = opened(config)
    for split, figures in results["splits"].items():
        for mixture, part in equal.items():
            assert figures[mixture] == figures[part]
            one, other = ((run.losses / split / f"{name}.npy").read_bytes() for name in (mixture, part))
            assert one == other


@pytest.mark.parametrize("of", ["searched", "cache_alone"])
def test_states_that_another_scan_has_cut_are_taken(request, tmp_path, of):
    """Those of a search, or of a cache, of knn.scan=queries; and beside a search that knn.scan=lists has begun."""
    config = copy_run(request.getfixturevalue(of), tmp_path / "run", *CACHE, "knn.splits=[valid]")
    run = RunDir.of(config)
    shutil.rmtree(run.cache("valid"), ignore_errors=True)
    before = file_hashes(run.states("valid")) if of == "cache_alone" else {}
    for scan in ("lists", "queries"):
        config.knn.scan = scan
        assert in_stage("knn", config, run_cache)["forward_tokens"] == 0
    if of == "cache_alone":
        begun = run.neighbours("valid")
        begun.mkdir(parents=True)
        plan = shutil.copy(run.states("valid") / "plan.json", begun / "plan.json")
        alter(Path(plan), blocks_per_unit=config.knn.blocks_per_unit)
        assert in_stage("knn", config, run_cache)["forward_tokens"] == 0
        assert file_hashes(run.states("valid")) == before
    else:
        assert not run.states("valid").exists()


def test_both_is_the_mixture_of_mixtures(cached):
    run, tuned, results = opened(cached)
    log_lm = Neighbours.open(run.neighbours("valid")).log_probs()
    knn = np.exp(-np.load(run.losses / "valid" / "knn.npy"))
    log_knn = np.log((knn - (1 - tuned["lambda"]) * np.exp(log_lm)).clip(0) / tuned["lambda"] + 1e-300)
    inner = interpolate(log_lm, log_knn, tuned["both"]["knn_lambda"])
    own = tuned["cache"]
    log_cache = Cache.open(run.cache("valid")).log_probs(own["window"], own["theta"])
    mixed = add_cache(inner, log_cache, tuned["both"]["cache_lambda"])
    assert mean_loss(mixed) == pytest.approx(results["splits"]["valid"]["both"]["loss_nats"], rel=1e-9)


def test_buckets_beside_a_cache_are_the_mixture_of_three(cached):
    """(1 − λ_c) [(1 − λ_k) p_LM + λ_k p_kNN] + λ_c p_cache with λ_k by distance, frozen, on the split not tuned on."""
    run, tuned, results = opened(cached)
    both, neighbours = tuned["both_buckets"], Neighbours.open(run.neighbours("test"))
    units = list(neighbours.units())
    p_lm = np.exp(neighbours.log_probs())
    scores = [knn_log_probs(u.distances, u.values, u.targets, tuned["temperature"], [tuned["k"]])[0] for u in units]
    nearest = np.concatenate([unit.distances[:, 0] for unit in units])
    weights = np.array(both["lambdas"])[np.searchsorted(both["edges"], nearest, side="right")]
    inner = (1 - weights) * p_lm + weights * np.exp(np.concatenate(scores))
    own, of_cache = tuned["cache"], both["cache_lambda"]
    p_cache = np.exp(Cache.open(run.cache("test")).log_probs(own["window"], own["theta"]))
    mixed = np.where(np.isnan(p_cache), inner, (1 - of_cache) * inner + of_cache * p_cache)
    figures = results["splits"]["test"]
    assert mean_loss(np.log(mixed)) == pytest.approx(figures["both_buckets"]["loss_nats"], rel=1e-9)
    assert results["splits"]["valid"]["both_buckets"]["loss_nats"] == pytest.approx(both["loss_nats"], rel=1e-12)
    assert set(figures["bootstrap"]["differences"]["both_buckets"]) == {"lm", "both", "knn_buckets"}
    assert "+ kNN + cache, λ by distance" in results_table(Results.read(run.results))


def test_a_model_without_datastore_gets_the_same_cache(cached, cache_alone):
    run, tuned, results = opened(cached)
    alone, tuned_alone, results_alone = opened(cache_alone)
    assert file_hashes(alone.root / "cache") == file_hashes(run.root / "cache")
    assert States.open(alone.states("valid")).fingerprint == States.open(run.neighbours("valid")).fingerprint
    assert not (run.root / "states").exists()
    assert tuned_alone["cache"] == tuned["cache"]
    assert "both" not in tuned_alone
    assert results_alone["datastore"] is None
    for split, figures in results_alone["splits"].items():
        assert figures["cache"] == results["splits"][split]["cache"]
        assert "knn" not in figures
    assert "+ kNN" not in results_table(Results.read(alone.results))
    assert evaluated_as_tuned(cache_alone, alone)


def test_a_search_after_the_cache_joins_it(cache_alone, cached, tmp_path):
    config = copy_run(cache_alone, tmp_path / "run", *CACHE)
    in_stage("datastore", config, run_datastore_write)
    in_stage("index", config, run_index_build)
    in_stage("knn", config, run_search)
    run = RunDir.of(config)
    assert not tuned_as_configured(config, run)
    with pytest.raises(DistlmError, match=r"tuned before .*neighbours.* run `distlm knn tune` again"):
        in_stage("knn", config, run_evaluate)
    for function in (run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    assert opened(config)[2]["splits"] == opened(cached)[2]["splits"]


def test_another_tap_has_states_of_its_own(cached, tmp_path):
    config = copy_run(cached, tmp_path / "run", *CACHE)
    run = RunDir.of(config)
    shutil.rmtree(run.root / "cache")
    config.cache.tap = "output"
    for function in (run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    _, tuned, results = opened(config)
    assert States.open(run.states("valid")).tap == tuned["cache"]["tap"] == "output"
    assert results["splits"]["valid"]["lm"] == opened(cached)[2]["splits"]["valid"]["lm"]


def test_the_partial_cache_is_recorded(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run", *CACHE, "cache.fill=partial")
    for function in (run_cache, run_tune, run_evaluate):
        in_stage("knn", config, function)
    _, _, results = opened(config)
    assert results["settings"]["cache"]["fill"] == "partial"
    tokens = results["splits"]["valid"]["tokens"]
    assert results["splits"]["valid"]["cached"] == pytest.approx(1 - 1 / tokens)


@pytest.mark.parametrize("stop_after", [1, 4, 8])
def test_a_stopped_start_continues_to_the_same_files(cache_alone, tmp_path, monkeypatch, stop_after):
    config = copy_run(cache_alone, tmp_path / "run", *CACHE)
    run = RunDir.of(config)
    whole = {name: file_hashes(run.root / name) for name in ("states", "cache")}
    for name in whole:
        shutil.rmtree(run.root / name)
    # Rounds of one unit.
    monkeypatch.setattr("distlm.runtime.units.rounds._GROWTH", 1)
    calls, original = 0, cache_run.each

    class Killed(BaseException):
        pass

    def dying(act, items):
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise Killed
        original(act, items)

    monkeypatch.setattr(cache_run, "each", dying)
    with pytest.raises(Killed):
        in_stage("knn", config, run_cache)
    with pytest.raises(DistlmError, match=r"not finished|nothing there"):
        Cache.open(run.cache("test"))
    monkeypatch.undo()
    in_stage("knn", config, run_cache)
    assert {name: file_hashes(run.root / name) for name in whole} == whole


@pytest.mark.parametrize("name", ["states", "cache"])
def test_another_run_that_fills_the_folder_is_not_disturbed(cache_alone, tmp_path, monkeypatch, name):
    monkeypatch.setattr("distlm.runtime.lock._PATIENCE_S", 0.1)
    config = copy_run(cache_alone, tmp_path / "run", *CACHE)
    folder = RunDir.of(config).root / name / "valid"
    shutil.rmtree(folder)
    one_writer_at_a_time(folder, lambda: in_stage("knn", config, run_cache))


def test_a_finished_cache_is_not_repeated_and_another_grid_is_refused(cached, tmp_path, monkeypatch):
    config = copy_run(cached, tmp_path / "run", *CACHE)
    run = RunDir.of(config)
    monkeypatch.setattr(cache_run, "open_forward", None)
    assert in_stage("knn", config, run_cache)["tokens"] == 0
    assert cached_as_configured(config, run)
    config.cache.thetas = [0.5]
    assert not cached_as_configured(config, run)
    with pytest.raises(DistlmError, match=r"thetas was \[0.01, 0.1\] and is \[0.5\] now.*remove .*cache/valid"):
        in_stage("knn", config, run_cache)


def test_another_grid_of_weights_is_tuned_in_the_same_directory(cached, tmp_path):
    config = copy_run(cached, tmp_path / "run", *CACHE)
    run = RunDir.of(config)
    assert tuned_as_configured(config, run)
    assert evaluated_as_tuned(config, run)
    config.cache.lambdas = [0.0, 0.05]
    assert not tuned_as_configured(config, run)
    in_stage("knn", config, run_tune)
    assert not evaluated_as_tuned(config, run)
    in_stage("knn", config, run_evaluate)
    assert evaluated_as_tuned(config, run)


def test_a_window_longer_than_the_split_is_one_clear_error(indexed, tmp_path):
    config = copy_run(indexed, tmp_path / "run", "cache.windows=[100,3785]")
    for call in (lambda: in_stage("knn", config, run_cache), lambda: plan_cache(config, 1)):
        with pytest.raises(DistlmError, match=r"cache.windows=\[100, 3785\]: split valid has \d+ tokens") as caught:
            call()
        assert "choose windows of at most" in str(caught.value)
    assert not (Path(config.run_dir) / "cache").exists()
    check_windows(CacheConfig(windows=[98]), "valid", 100)
    with pytest.raises(DistlmError, match="at most 98 tokens"):
        check_windows(CacheConfig(windows=[99]), "valid", 100)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("cache.windows=[60,5]", "cache.windows=.*rising"), ("cache.windows=[0]", "cache.windows"),
        ("cache.windows=[]", "cache.windows"), ("cache.thetas=[0.0]", "cache.thetas=.*above 0"),
        ("cache.thetas=[]", "cache.thetas"), ("cache.lambdas=[1.0]", r"cache.lambdas=.*\[0, 1\)"),
        ("cache.fill=half", "cache.fill"), ("cache.window=5", "cache.window"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(setting, words):
    with pytest.raises(UsageError, match=words):
        load_config("demo", [setting])


def test_tuning_and_evaluation_say_what_is_missing(cached, indexed, tmp_path):
    config = copy_run(cached, tmp_path / "run", *CACHE, "cache.use=true")
    run = RunDir.of(config)
    shutil.move(run.cache("test"), tmp_path / "test")
    with pytest.raises(DistlmError, match="split test has no cache; run `distlm knn cache` for all splits"):
        in_stage("knn", config, run_evaluate)
    shutil.rmtree(run.cache("valid"))
    with pytest.raises(DistlmError, match="tuned with cache, and valid has none; run `distlm knn cache` again"):
        in_stage("knn", config, run_evaluate)
    with pytest.raises(DistlmError, match=r"cache.use=true, .* run `distlm knn cache`"):
        in_stage("knn", config, run_tune)
    nothing = copy_run(indexed, tmp_path / "nothing")
    with pytest.raises(DistlmError, match=r"no search results.* run `distlm knn search`, or `distlm knn cache`"):
        in_stage("knn", nothing, run_tune)


def test_a_cache_of_another_model_is_refused(cached, tmp_path):
    config = copy_run(cached, tmp_path / "run", *CACHE)
    path = RunDir.of(config).cache("test") / "manifest.json"
    alter(path, model="0" * 32)
    with pytest.raises(DistlmError, match="cache belongs to another model"):
        in_stage("knn", config, run_evaluate)


def test_the_plan_announces_the_disk(cached, cache_alone, tmp_path):
    run = RunDir(Path(cached.run_dir))
    announced = plan_cache(cached, 1)
    assert "1106 tokens (valid, test), 2 windows up to 60 x 2 θ" in announced.line()
    assert announced.disk_bytes == 1106 * 4 * 4
    stored = sum(path.stat().st_size for path in (run.root / "cache").rglob("*.npy"))
    assert stored == pytest.approx(announced.disk_bytes, rel=0.1)

    config = copy_run(cache_alone, tmp_path / "run", *CACHE)
    states = RunDir.of(config).root / "states"
    stored += sum(path.stat().st_size for path in states.rglob("*.npy"))
    shutil.rmtree(states)
    announced = plan_cache(config, 1)
    assert stored == pytest.approx(announced.disk_bytes, rel=0.1)
    assert any("hidden states of 1106 tokens: they are computed first" in note for note in announced.notes)


def test_the_pipeline_makes_it_when_it_is_asked_for(tmp_path):
    words = [f"run_dir={tmp_path}", "launch.ranks=2"]
    assert "knn cache" not in plan_pipeline(load_config("demo", words), "demo", words)
    words += ["cache.use=true"]
    plan = plan_pipeline(load_config("demo", words), "demo", words)
    assert re.search(r"-n 2 distlm knn cache demo", plan)
    assert plan.index("knn search demo") < plan.index("knn cache demo") < plan.index("knn tune demo")
