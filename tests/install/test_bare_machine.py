"""The README's two commands, and the steps of the images, on a machine that has nothing else: a minimal Debian."""

import re
import subprocess
from pathlib import Path

import pytest
from support.bare import NEEDED, SHORT, Machine, bare_machine

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "containers/Dockerfile"
DEFINITION = ROOT / "containers/distlm.def"
HOUR_S = 3600.0


def clean_clone(machine: Machine, folder: Path) -> None:
    """What is committed, and nothing that lies beside it here; without git's own folder, as from an archive."""
    archive = folder / "tree.tar"
    subprocess.run(["git", "archive", "-o", str(archive), "HEAD"], cwd=ROOT, check=True)
    (machine.root / "root/distlm").mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(machine.root / "root/distlm")], check=True)


@pytest.mark.slow
def test_the_two_commands_of_the_readme_on_a_bare_machine(tmp_path: Path) -> None:
    shown = re.search(r"## Two commands\n+```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert shown is not None and shown[1].split("\n")[:2] == ["make demo", "make test"]
    machine = bare_machine(tmp_path / "machine")
    clean_clone(machine, tmp_path)
    have = machine.run("dpkg-query -W -f='${Package} '; command -v git ninja mpirun || true", tmp_path / "have.log", 60)
    assert set(NEEDED) <= {*have.split()} and "/mpirun" not in have and "/git" not in have
    said = machine.run("cd ~/distlm && make demo", tmp_path / "demo.log", HOUR_S)
    print(said[-3000:])
    assert "perplexity" in said and (machine.root / "root/distlm/runs/demo/report.html").is_file()
    again = machine.run("cd ~/distlm && make demo", tmp_path / "again.log", HOUR_S)
    assert "complete" in again
    # All tests take longer than one test may: here style, types, import rules, and one folder of them.
    said = machine.run("cd ~/distlm && make test TESTS=tests/config", tmp_path / "test.log", HOUR_S)
    print(said[-1500:])
    assert re.search(r"\d+ passed", said) and " failed" not in said and "KEPT" in said


def dockerfile_steps() -> tuple[dict[str, str], list[tuple[str, str]], list[str]]:
    """(variables, copies, commands) of the Dockerfile, with the defaults of its arguments."""
    text = DOCKERFILE.read_text("utf-8").replace("\\\n", " ")
    variables: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    commands: list[str] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        word, _, rest = line.partition(" ")
        for name, value in variables.items():
            rest = rest.replace(f"${{{name}}}", value)
        if word in ("ARG", "ENV"):
            variables |= dict(pair.split("=", 1) for pair in rest.split() if "=" in pair)
        elif word == "COPY":
            *sources, target = rest.split()
            copies += [(name, target + name if target.endswith("/") else target) for name in sources]
        elif word == "RUN":
            commands.append(rest)
    return variables, copies, commands


def definition_steps() -> tuple[dict[str, str], list[tuple[str, str]], list[str]]:
    """The same of Apptainer's definition."""
    sections = dict(re.findall(r"^%(\w+)\n((?:(?:    .*)?\n)*)", DEFINITION.read_text("utf-8") + "\n", re.MULTILINE))
    arguments = dict(line.split("=", 1) for line in sections["arguments"].split())
    post = re.sub(r"\{\{ (\w+) \}\}", lambda found: arguments[found[1]], sections["post"])
    lines = [line.split() for line in sections["files"].strip().splitlines()]
    env = dict(pair.split("=", 1) for pair in sections["environment"].replace("export", "").split())
    return arguments | env, [(source, target) for source, target in lines], [post.strip(), sections["test"].strip()]


def test_the_two_images_are_made_of_the_same_steps() -> None:
    docker, apptainer = dockerfile_steps(), definition_steps()
    assert docker[1] == apptainer[1] and docker[2] == apptainer[2][:1] == ["bash /src/containers/install.sh cpu /src"]
    assert docker[0]["KIND"] == apptainer[0]["KIND"] == "cpu"
    assert docker[0]["PATH"].startswith("/opt/distlm/bin:") and apptainer[0]["PATH"].startswith("/opt/distlm/bin:")
    for name, _ in docker[1]:
        assert (ROOT / name).exists(), name
    base = "debian:bookworm-slim"
    assert docker[0]["BASE"] == base and f"From: {base}\n" in DEFINITION.read_text("utf-8")


@pytest.mark.slow
def test_the_steps_of_the_images_run_on_a_bare_machine(tmp_path: Path) -> None:
    """They differ in their words only (the test above), so they run once. What the image then starts is the demo."""
    machine = bare_machine(tmp_path / "machine", include=())
    variables, copies, commands = dockerfile_steps()
    for name, target in copies:
        machine.copy(ROOT / name, target)
    for command in [*commands, definition_steps()[2][-1]]:
        said = machine.run(command, tmp_path / "step.log", HOUR_S, **variables)
        print(said[-3000:])
    work = {name: variables[name] for name in ("PATH", "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")}
    start = f"mkdir -p /work && cd /work && rm -rf /src && distlm run demo {' '.join(SHORT)}"
    said = machine.run(start, tmp_path / "demo.log", HOUR_S, **work)
    assert "perplexity" in said and (machine.root / "work/runs/demo/report.html").is_file()
    submitted = "distlm submit demo name=two --ranks 2 --cluster slurm --dry-run"
    shown = (
        f"cd /work && distlm site init && {submitted} && mpirun --version && /opt/distlm/bin/ompi_info | grep -i pmix"
    )
    said = machine.run(shown, tmp_path / "jobs.log", 600, **work)
    assert "Open MPI" in said and "pmix" in said.lower() and "#SBATCH" in said
