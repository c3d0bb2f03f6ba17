"""A bare machine: a minimal Debian in a folder, made by mmdebstrap, and commands that run in it (chroot).

It takes the mirror from this machine's apt and the packages' index from this machine's pip, whatever they are; its
network is this machine's. Mounts are made in a mount namespace of each command, so none outlives it.
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

NEEDED = ("python3", "python3-venv", "gcc", "make")
"""What the README asks for; everything else a command must bring itself."""
SHORT = ("train.updates=20", "train.warmup_updates=4", "train.cosine_period=16", "knn.ladder_sample=16")
"""The demo after a twentieth of its training: where only its installation is asked about."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NETWORK = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass(frozen=True)
class Machine:
    """A Debian below `root`."""

    root: Path

    def run(self, command: str, log: Path, timeout: float, **environment: str) -> str:
        """`bash -c COMMAND` in it, with nothing of this process's environment but its way to packages; what it printed.

        AssertionError with the end of the log where it fails.
        """
        pip = pip_settings()
        shown = {path: path for value in pip.values() for path in _local_paths(value)}
        for path in filter(Path.is_file, list(shown)):
            # At its own place a package of the machine may want to put a file of that name.
            shown[path] = Path("/run/lent") / path.name
            pip = {name: value.replace(str(path), str(shown[path])) for name, value in pip.items()}
        mounts = ["mount --make-rprivate /", f"mount -t proc proc {self._at('/proc')}"]
        mounts += [f"mount --rbind {name} {self._at(name)}" for name in ("/dev", "/sys")]
        for path, there in shown.items():
            place = self.root / there.relative_to("/")
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            mounts.append(f"mount --bind -o ro {shlex.quote(str(path))} {self._at(str(there))}")
        for name in ("/etc/resolv.conf", "/etc/hosts"):
            shutil.copyfile(name, self.root / name[1:])
        env = {"HOME": "/root", "PATH": _PATH, "LANG": "C.UTF-8", **pip, **environment}
        env |= {name: os.environ[name] for name in _NETWORK if name in os.environ}
        words = ["chroot", str(self.root), "/usr/bin/env", "-i", *(f"{name}={value}" for name, value in env.items()),
                 "bash", "-c", command]  # fmt: skip
        script = "\n".join(["set -e", *mounts, f"exec {shlex.join(words)}"])
        with log.open("w") as stream:
            stream.write(f"$ {command}\n")
            stream.flush()
            done = subprocess.run(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script],
                stdout=stream, stderr=subprocess.STDOUT, timeout=timeout,
            )  # fmt: skip
        text = log.read_text("utf-8", "replace")
        assert done.returncode == 0, f"exit {done.returncode}; {log}\n{text[-4000:]}"
        return text

    def copy(self, source: Path, place: str) -> None:
        """A file or folder of this machine, at a path in it."""
        target = self.root / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)

    def _at(self, path: str) -> str:
        return shlex.quote(str(self.root / path.lstrip("/")))


def bare_machine(root: Path, include: tuple[str, ...] = NEEDED) -> Machine:
    """A Debian of this machine's release with those packages. Skips the test where none can be made."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text("utf-8").splitlines() if "=" in line
    )
    suite = release.get("VERSION_CODENAME", "").strip('"')
    if release.get("ID") != "debian" or not suite:
        pytest.skip("a bare machine is made on Debian only")
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"]).returncode:
        pytest.skip("a bare machine needs root and namespaces")
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed: apt-get install mmdebstrap")
    command = ["mmdebstrap", "--mode=root", "--variant=minbase"]
    command += [f"--include={','.join(include)}"] if include else []
    command += [f"--aptopt={option}" for option in _apt_options()]
    done = subprocess.run([*command, suite, str(root), *_sources(suite)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Machine(root)


def pip_settings() -> dict[str, str]:
    """This machine's settings of pip, from its files and its environment, as environment variables."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    found = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        scope, _, name = key.rpartition(".")
        if scope in ("global", "install"):
            found[f"PIP_{name.upper().replace('-', '_')}"] = value.strip("'\"").replace("\\n", " ").strip()
    return found | {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def _local_paths(value: str) -> list[Path]:
    """The files and folders of this machine that a setting names."""
    paths = [Path(word.removeprefix("file://")) for word in value.split() if word.startswith(("/", "file:///"))]
    # An index in a folder has its files beside it.
    paths = [path.parent if path.name == "simple" else path for path in paths]
    return sorted({path for path in paths if path.exists()})


def _sources(suite: str) -> list[str]:
    """This machine's own lists of the release's packages, as mmdebstrap takes them."""
    folder = Path("/etc/apt/sources.list.d")
    files = [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list")), *sorted(folder.glob("*.sources"))]
    return [str(path) for path in files if path.is_file() and f"{suite}-security" in path.read_text("utf-8")]


def _apt_options() -> list[str]:
    """This machine's way to its mirror: proxies and checks."""
    dumped = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    return [
        line.rstrip(";") for line in dumped.splitlines()
        if line.startswith(("Acquire::http", "Acquire::https", "Acquire::Check")) and not line.endswith(' "";')
    ]  # fmt: skip
