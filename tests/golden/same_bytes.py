"""Whether two versions of the code write the same bytes in five small runs (small_runs.py).

    python tests/golden/same_bytes.py make OUT               the runs, with the code that `python -m distlm` finds here
    python tests/golden/same_bytes.py compare BEFORE AFTER   0: equal but for EXCEPTIONS, 1: not

Code that only moves must not change what it computes. Make both on one machine: another processor rounds other last
bits. `compare` takes the sums of the two folders anew, so that the lists below may grow; sums.json, which `make`
writes, may stand for a folder that is gone.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from small_runs import make_runs

# Files of which only the presence is compared → why.
NOT_READ = {
    "*/code.json": "versions of code and libraries",
    "logs/*": "output of the commands, with times",
    "*/report.html": "has times and plots of times; its numbers come from results.json and metrics.jsonl",
}
# Safetensors writes a file's metadata in any order: `sha256` sorts it, what is made of the raw bytes is not compared.
UNORDERED = "checksum of a memory's safetensors file, whose metadata are in any order"
NO_TAP = "a masked language model has no state that a datastore could hold, and names none now"
# Files → keys in them that are not compared (NAME, or with keys above it KEY/NAME; * as in a shell) → why.
NOT_COMPARED = {
    "*.json": {
        "seconds": "time",
        "tokens_per_s": "speed",
        "code": "versions of code and libraries",
        "format": "every record has the number of its format now",
    },
    "*/metrics.jsonl": {
        "time": "time",
        "stage/seconds": "time",
        "stage/start_seconds": "time",
        "stage/processor_s": "time",
        "perf/*seconds": "time",
        "perf/*_s": "times and speeds",
        "rows_per_s": "speed",
    },
    "*/tokens/meta.json": {"text_dir": "absolute path"},
    "*/complete.json": {
        "files/state.json/*": "size and checksum of a file that has speeds in it",
        "files/model.json/*": "size and checksum of a file that has a format now",
        "files/memory-*/hash": UNORDERED,
    },
    "*/export/memory.json": {"files/memory-*/hash": UNORDERED},
    "*/lm.json": {"model/memory_files/*": UNORDERED},
    "finetune-*/finetune/*.json": {
        "source": UNORDERED,
        "truncation": "a new setting: what was always done is one of it",
    },
    "finetune-*/predictions/*/manifest.json": {"model": UNORDERED},
    "plm-*/checkpoints/*.json": {"tap": NO_TAP},
    "finetune-*/*.json": {"tap": NO_TAP},
}
# Lines of metrics.jsonl with one of these keys are not compared: they are about times, on which their number depends.
OF_TIMES = {"progress/done", "perf/valid_s", "perf/save_s"}
# Files that differ between the code before and after on purpose → why.
EXCEPTIONS = {
    "*/config.yaml": "has no longer the sections of other kinds of models",
    "*/configs/*.yaml": "has no longer the sections of other kinds of models",
    "finetune-*/predictions/*": "fine-tuning writes predictions now",
}


def sums(place: Path) -> dict[str, str]:
    """Path → sha256 of what is compared of each file in the folders of OUT; of a sums.json its content."""
    if place.is_file():
        return dict(json.loads(place.read_text("utf-8")))
    files = sorted(path.relative_to(place).as_posix() for path in place.glob("*/**/*") if path.is_file())
    return {name: sha256(place, name) for name in files}


def sha256(out: Path, name: str) -> str:
    """Of the bytes of a file; of a JSON or YAML file of its content, keys sorted, without those of NOT_COMPARED."""
    if reason(name, NOT_READ):
        return "not read"
    found = content(out, name)
    data = (out / name).read_bytes() if found is None else canonical(found)
    if name.endswith(".safetensors"):
        end = 8 + int.from_bytes(data[:8], "little")
        data = canonical(json.loads(data[8:end])) + data[end:]
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys."""
    return json.dumps(value, sort_keys=True).encode()


def content(out: Path, name: str) -> Any:
    """What is compared of a JSON or YAML file; None of others."""
    kind = Path(name).suffix
    if kind not in (".json", ".jsonl", ".yaml"):
        return None
    text = (out / name).read_text("utf-8")
    if kind == ".jsonl":
        found = [line for line in map(json.loads, text.splitlines()) if not OF_TIMES & line.keys()]
    else:
        found = json.loads(text) if kind == ".json" else yaml.safe_load(text)
    return without([key for files, keys in NOT_COMPARED.items() if fnmatch(name, files) for key in keys], found)


def without(patterns: list[str], value: Any, above: str = "") -> Any:
    """`value` without the keys that a pattern fits; `above`: the keys above it."""
    if isinstance(value, list):
        return [without(patterns, item, above) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: f"{above}/{key}" for key in value if not any(fnmatch(f"{above}/{key}", f"*/{p}") for p in patterns)}
    return {key: without(patterns, value[key], place) for key, place in kept.items()}


def reason(name: str, table: dict[str, str]) -> str:
    """Of the first pattern that fits; empty where none does."""
    return next((text for pattern, text in table.items() if fnmatch(name, pattern)), "")


def compare(before: Path, after: Path) -> bool:
    """Print what is not equal; True when all of it is in EXCEPTIONS."""
    one, other = sums(before), sums(after)
    excepted: Counter[str] = Counter()
    wrong = 0
    for name in sorted({*one, *other}):
        if one.get(name) == other.get(name):
            continue
        if why := reason(name, EXCEPTIONS):
            excepted[why] += 1
            continue
        wrong += 1
        print("missing:" if name not in other else "new:    " if name not in one else "differs:", name)
        if name in one and name in other and before.is_dir() and after.is_dir():
            for line in list(differences(content(before, name), content(after, name)))[:5]:
                print(f"           {line[:160]}")
    for why, count in excepted.items():
        print(f"{count} files differ on purpose: {why}")
    print(f"{len(one)} files before, {len(other)} after, {wrong} not as they should be")
    return not wrong and bool(one)


def differences(one: Any, other: Any, above: str = "") -> Iterator[str]:
    """Keys and both values, where two contents are not equal."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from differences(one.get(key), other.get(key), f"{above}/{key}")
    elif one != other:
        yield f"{above}: {one!r} before, {other!r} after"


def main() -> None:
    """`make` and `compare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("make").add_argument("out", type=Path)
    child = verbs.add_parser("compare")
    child.add_argument("before", type=Path)
    child.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.verb == "make":
        out = options.out.resolve()
        make_runs(out)
        (out / "sums.json").write_text(json.dumps(sums(out), indent=1) + "\n", "utf-8")
    elif not compare(options.before, options.after):
        sys.exit(1)


if __name__ == "__main__":
    main()
