"""Checking and converting shards of rows and datastores."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from distlm.commands.shared import Add, config_of, one_line, print_once
from distlm.errors import EXIT_DONE, EXIT_ERROR, UsageError
from distlm.runtime.ranks.world import World, refuse_script_body
from distlm.runtime.stage import open_stage


def add_verbs(add: Add) -> None:
    """data verify, datastore verify, info, import-memmap, export-memmap."""
    add("data verify", "read every shard of token rows and compare its checksum", _data_verify, stage="shard")
    add("datastore verify", "read every shard and compare its checksum", _datastore_verify, stage="datastore")
    add("datastore info", "what the datastore holds", _datastore_info, stage="datastore")
    child = add("datastore import-memmap", "the original's PREFIX_keys.npy and PREFIX_vals.npy become the datastore",
                _datastore_memmap, stage="datastore", into="import")  # fmt: skip
    child.add_argument("--prefix", required=True, help="what comes before _keys.npy and _vals.npy")
    child = add("datastore export-memmap", "the datastore as the original's PREFIX_keys.npy and PREFIX_vals.npy",
                _datastore_memmap, stage="datastore", into="export")  # fmt: skip
    child.add_argument("--prefix", required=True, help="what comes before _keys.npy and _vals.npy")
    child.add_argument("--keys", choices=("float16", "float32"), default="", help="default: as they are stored")
    child.add_argument("--values", choices=("int64", "int32", "int16"), default="int64", help="default int64")


def _data_verify(options: argparse.Namespace, world: World) -> int:
    from distlm.data.shards.reader import verify_shards
    from distlm.runtime.rundir import RunDir

    config = config_of(options)
    folder = RunDir.of(config).shards(config)
    return _verified(folder, verify_shards(folder), world)


def _datastore_verify(options: argparse.Namespace, world: World) -> int:
    from distlm.datastore.verify import verify_datastore
    from distlm.runtime.rundir import RunDir

    folder = RunDir.of(config_of(options)).datastore
    return _verified(folder, verify_datastore(folder), world)


def _verified(folder: Path, problems: Sequence[str], world: World) -> int:
    for problem in problems:
        print(f"FAIL {problem}", file=sys.stderr)
    print_once(f"{folder}: {'whole' if not problems else f'{len(problems)} problems'}", world)
    return EXIT_ERROR if problems else EXIT_DONE


def _datastore_info(options: argparse.Namespace, world: World) -> int:
    from distlm.datastore.verify import datastore_info
    from distlm.runtime.rundir import RunDir

    return print_once(json.dumps(datastore_info(RunDir.of(config_of(options)).datastore), indent=1), world)


def _datastore_memmap(options: argparse.Namespace, world: World) -> int:
    from distlm.datastore.exchange.memmap import export_memmap, import_memmap

    config = config_of(options)
    refuse_script_body(world)
    if config.launch.share and options.into == "export":
        raise UsageError(f"launch.share={config.launch.share}: `distlm datastore export-memmap` has no shares")
    with open_stage("datastore", config, world) as stage:
        if options.into == "import":
            told = one_line(import_memmap(stage, options.prefix))
        else:
            told = one_line(export_memmap(stage, options.prefix, options.keys, options.values))
    return print_once(f"datastore {options.into}-memmap: {told}", world)
