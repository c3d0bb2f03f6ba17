"""What a fine-tuning takes from its run's pretraining: the settings that the run recorded, whatever recipe is named."""

import copy
from pathlib import Path
from typing import Any

from distlm.config.load import config_tree, leaf_fields
from distlm.config.schema import RunConfig
from distlm.config.yaml_files import recorded_settings
from distlm.runtime.progress import say
from distlm.runtime.rundir import RunDir, stage_sections

_STAGES = {"shard": ("shard",), "train": ("shard", "train")}
"""Stages of the pretraining, and those whose sections their records hold; the later record goes first."""

_SHOWN = 6
"""Of the settings that are put aside; a run directory as the recipe has none."""


def as_pretrained(config: RunConfig, rank: int = 0) -> RunConfig:
    """The configuration with the settings that decided the run's shards and checkpoint as they are recorded there.

    Rank 0 says which of the given ones are put aside for that. A run directory that was not pretrained in, or with
    another kind of model, changes nothing.
    """
    found, run = copy.deepcopy(config), RunDir(Path(config.run_dir))
    put_aside = []
    for key, value in _recorded(config, run).items():
        section, _, name = key.partition(".")
        given = getattr(getattr(found, section), name)
        if given != value:
            put_aside.append(f"{key}={value!r} (not {given!r})")
            setattr(getattr(found, section), name, value)
    if put_aside:
        more = f" and {len(put_aside) - _SHOWN} more" if len(put_aside) > _SHOWN else ""
        say(f"finetune: as {run.root} was pretrained: {', '.join(put_aside[:_SHOWN])}{more}", rank)
    return found


def _recorded(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Dotted name → value of the settings that the pretraining's stages recorded."""
    values: dict[str, Any] = {}
    # A setting that is newer than the run had its default value then.
    defaults = config_tree(type(config)())
    for stage, held in _STAGES.items():
        path = run.root / "configs" / f"{stage}.yaml"
        tree = recorded_settings(path)
        if tree.get("model", {}).get("kind") != config.model.kind:
            continue
        sections = {section for each in held for section in stage_sections(each, config.model.kind)}
        for key, item in leaf_fields(type(config)).items():
            section, _, name = key.partition(".")
            if section in sections and not item.metadata.get("volatile"):
                values[key] = tree.get(section, {}).get(name, defaults[section][name])
    return values
