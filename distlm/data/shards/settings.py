"""Which settings decide the shards, and whether a folder holds the shards of some settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlm.data.shards.config import ShardsConfig
from distlm.data.shards.files import MANIFEST, TOKENIZER_FOLDER, ShardsManifest, ShardsPlan
from distlm.data.shards.wordpiece import TOKENIZER, VOCABULARY, WordPiece
from distlm.data.text_source import folder_sources
from distlm.errors import DistlmError

_ALWAYS = ("splits", "documents", "lower_case", "row_tokens", "cross_documents", "chunk_rows", "shard_text")


def shard_settings(config: ShardsConfig) -> dict[str, Any]:
    """The settings that decide the bytes of the shards. Reads the vocabulary file, of which the hash counts."""
    settings: dict[str, Any] = {"source": config.source}
    if config.source == "hub":
        settings |= {name: getattr(config, name) for name in ("hub_name", "hub_config", "hub_field")}
    settings |= {name: getattr(config, name) for name in _ALWAYS}
    if config.vocabulary:
        return settings | {"vocabulary": WordPiece.load(Path(config.vocabulary), config.lower_case).hash}
    if "train" not in config.splits:
        raise DistlmError(
            f"shards.splits={config.splits} has no train split to train a vocabulary on; set shards.vocabulary to a "
            "vocab.txt, e.g. that of other shards (their folder tokenizer)"
        )
    return settings | {name: getattr(config, name) for name in ("vocabulary", "vocabulary_size", "vocabulary_text")}


def finished_shards(folder: Path, config: ShardsConfig) -> ShardsManifest | None:
    """The manifest of the shards of these settings, or None when the folder is not (completely) made.

    Raises DistlmError when they were made with other settings, or the text files have changed in size since.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = ShardsManifest.read(folder)
    refuse_other_settings(folder, manifest.plan, shard_settings(config))
    refuse_other_text(folder, manifest.plan, config)
    whole = all(shard.problem(folder) is None for shards in manifest.shards.values() for shard in shards)
    tokenizer = all((folder / TOKENIZER_FOLDER / name).is_file() for name in (VOCABULARY, TOKENIZER))
    return manifest if whole and tokenizer else None


def refuse_other_settings(folder: Path, plan: ShardsPlan, settings: Mapping[str, Any]) -> None:
    """DistlmError naming the settings that differ from those of the plan."""
    if changed := plan.differences(settings):
        raise DistlmError(
            f"{folder}: these shards were begun with other settings ({'; '.join(changed)}); use the same settings, "
            "another shards.folder= or run_dir=, or remove the folder"
        )


def refuse_other_text(folder: Path, plan: ShardsPlan, config: ShardsConfig) -> None:
    """DistlmError when the text files are not those of the plan, by name and size. Text that is gone is no error."""
    if config.source != "folder" or not Path(config.text_dir).is_dir() or not config.text_dir:
        return
    for split, files in folder_sources(config.text_dir, config.splits).items():
        before = {facts["name"]: facts["bytes"] for facts in plan.text[split]}
        now = {source.name: source.path.stat().st_size for source in files}
        changed = [
            f"{name}: {before.get(name, 'no')} bytes there, {now.get(name, 'no')} now"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise DistlmError(
                f"{config.text_dir}: not the text of the shards in {folder} ({'; '.join(changed[:3])}); put the old "
                "text back, or choose another shards.folder or run_dir"
            )
