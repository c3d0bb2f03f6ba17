"""docs/cluster.md and the README against the launchers: modules, flags, scripts and site files that they show exist."""

import argparse
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from support.deadline import DEADLINE_S
from support.present import present

from distlm.config import load_config
from distlm.models.registry import kind
from distlm.pipeline import STEPS, plan_step
from distlm.runtime.files import format_bytes
from launchers.site import STAGES, Site, load_site, parse_site
from launchers.stages.graph import build_graph

ROOT = Path(__file__).resolve().parents[2]
TEXT = "\n".join((ROOT / name).read_text("utf-8") for name in ("docs/cluster.md", "README.md"))
NAMES = ("submit", "site", "status", "logs", "cancel", "requeue", "deepspeed")
SHOWN = sorted(set(re.findall(rf"\bdistlm ({'|'.join(NAMES)})\b([^\n#)`]*)", TEXT)))


@cache
def help_of(name: str) -> str:
    command = [sys.executable, "-m", "distlm", name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "words"), SHOWN)
def test_a_shown_launcher_has_the_flags_it_is_shown_with(name: str, words: str) -> None:
    for flag in re.findall(r"--[a-z][a-z-]*", words):
        assert flag in help_of(name), f"distlm {name}{words}"


@pytest.mark.parametrize("name", NAMES)
def test_a_launcher_of_the_source_tree_is_the_verb_of_its_name(name: str) -> None:
    """What one takes the other takes; `python -m launchers.NAME` is how a source tree is used without installing."""
    module = import_module(f"launchers.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h"}
    assert not [flag for flag in flags if flag not in help_of(name)] and callable(module.main)


def test_the_page_shows_every_launcher_that_users_call() -> None:
    assert {name for name, _ in SHOWN} == {*NAMES}


def test_shown_scripts_exist_and_are_all_the_stages() -> None:
    for script in re.findall(r"slurm/([\w.-]+\.(?:sbatch|yaml))", TEXT):
        assert (ROOT / "slurm" / script).exists(), script
    scripts = {path.stem for path in (ROOT / "slurm").glob("*.sbatch")}
    assert scripts >= {*STAGES, "run"}


def test_shown_site_files_are_accepted() -> None:
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/cluster.md").read_text("utf-8"), re.DOTALL)
    assert len(shown) == 1
    site = parse_site(yaml.load(shown[0], yaml.BaseLoader), "docs/cluster.md")
    assert site.resources("datastore").array == 32
    example, _ = load_site(str(ROOT / "slurm/site.example.yaml"))
    # The pages submit this recipe: a number of ranks that its batch refuses is an error of build_graph.
    config = load_config("wikitext103", ["data.text_dir=/path/to/wikitext-103"])
    found = [next(job.ranks for job in build_graph(config, each, STAGES) if job.stage == "train")
             for each in (site, example, Site())]  # fmt: skip
    assert found == [8, 8, 4]


def test_the_script_of_the_training_has_a_number_of_ranks_that_the_recipe_takes() -> None:
    script = (ROOT / "slurm/train.sbatch").read_text("utf-8")
    nodes, tasks = (int(present(re.search(rf"^#SBATCH --{name}=(\d+)$", script, re.MULTILINE))[1])
                    for name in ("nodes", "ntasks-per-node"))  # fmt: skip
    kind("transformer_lm").require_ranks(load_config("wikitext103", []), nodes * tasks)


def test_shown_micro_batches_run_on_the_ranks_they_are_shown_for() -> None:
    row = re.search(r"^\| `train\.micro_blocks` .*?\((\w+) on (\d+) ranks\) \|(.*)\|$", TEXT, re.MULTILINE)
    assert row is not None
    sizes = set(re.findall(r"\d+", row[3]))
    assert sizes
    for size in sizes:
        config = load_config(row[1], [f"train.micro_blocks={size}", f"launch.ranks={row[2]}"])
        assert plan_step(STEPS["train"], config).memory_bytes > 0


def test_shown_memory_is_the_plan_s() -> None:
    size = r"(\S+ \S+) \+ (\S+ \S+)"
    shown = re.findall(rf"^\| `(zero\d\S*)` \|.*\| {size} \| {size} \|$", TEXT, re.MULTILINE)
    assert {name for name, *_ in shown} == {f"zero{stage}{more}" for stage in (1, 2, 3) for more in ("", "-offload")}
    asked = re.search(r"`distlm plan\s+wikitext103\s+([^`]*train.optimizer[^`]*)`", TEXT)
    assert asked is not None
    for name, *sizes in shown:
        found = []
        for ranks in (1, 8):
            settings = [*asked[1].split(), f"train.deepspeed={name}", f"launch.ranks={ranks}"]
            plan = plan_step(STEPS["train"], load_config("wikitext103", settings))
            found += [format_bytes(plan.device_bytes), format_bytes(plan.host_bytes)]
        assert sizes == found, name
