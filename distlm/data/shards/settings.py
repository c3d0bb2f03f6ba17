"""Which settings decide the shards, and whether a folder holds the shards of some settings."""

from pathlib import Path

from distlm.data.shards.config import ShardsConfig
from distlm.data.shards.files import MANIFEST, TOKENIZER_FOLDER, ShardsManifest, ShardsPlan
from distlm.data.shards.records import ShardSettings
from distlm.data.shards.wordpiece import TOKENIZER, VOCABULARY, WordPiece
from distlm.data.text.choice import choice_of_shards
from distlm.data.text.folder import folder_sources, sizes_now
from distlm.errors import DistlmError


def shard_settings(config: ShardsConfig) -> ShardSettings:
    """The settings that decide the bytes of the shards. Reads the vocabulary file, because its hash is one of them."""
    settings = ShardSettings(
        source=config.source, splits=config.splits, documents=config.documents, lower_case=config.lower_case,
        row_tokens=config.row_tokens, cross_documents=config.cross_documents, chunk_rows=config.chunk_rows,
        shard_text=config.shard_text, vocabulary="",
    )  # fmt: skip
    if config.source == "hub":
        settings.hub_name, settings.hub_config = config.hub_name, config.hub_config
        settings.hub_field = config.hub_field
    if config.source == "folder" and config.text_field != ShardsConfig.text_field:
        settings.text_field = config.text_field
    if config.valid_share:
        settings.valid_share = config.valid_share
    if config.test_share:
        settings.test_share = config.test_share
    if config.vocabulary:
        settings.vocabulary = WordPiece.load(Path(config.vocabulary), config.lower_case).hash
        return settings
    if "train" not in config.splits:
        raise DistlmError(
            f"shards.splits={config.splits} has no train split to train a vocabulary on; set shards.vocabulary to a "
            "vocab.txt, e.g. that of other shards (their folder tokenizer)"
        )
    settings.vocabulary_size, settings.vocabulary_text = config.vocabulary_size, config.vocabulary_text
    return settings


def finished_shards(folder: Path, config: ShardsConfig) -> ShardsManifest | None:
    """The manifest of the shards of these settings, or None when the folder is not (completely) made.

    Raises DistlmError when they were made with other settings, or the text files have changed in size since.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = ShardsManifest.read(folder)
    refuse_other_settings(folder, manifest.plan, shard_settings(config))
    _refuse_changed_files(folder, manifest.plan, config)
    whole = all(shard.problem(folder) is None for shards in manifest.shards.values() for shard in shards)
    tokenizer = all((folder / TOKENIZER_FOLDER / name).is_file() for name in (VOCABULARY, TOKENIZER))
    return manifest if whole and tokenizer else None


def refuse_other_settings(folder: Path, plan: ShardsPlan, settings: ShardSettings) -> None:
    """DistlmError naming the settings that differ from those of the plan."""
    if changed := plan.differences(settings):
        raise DistlmError(
            f"{folder}: these shards were begun with other settings ({'; '.join(changed)}); use the same settings, "
            "another shards.folder= or run_dir=, or remove the folder"
        )


def refuse_other_text(folder: Path, plan: ShardsPlan, config: ShardsConfig) -> None:
    """DistlmError when the text files are not those of an unfinished plan, by name and size. Text that is gone is no
    error here."""
    if not _has_text(config):
        return
    choice = choice_of_shards(config)
    sources = folder_sources(choice)
    for split in choice.splits:
        now = {source.name: source.path.stat().st_size for source in sources[choice.origin(split)]}
        _compare(folder, plan, config, split, now)


def _refuse_changed_files(folder: Path, plan: ShardsPlan, config: ShardsConfig) -> None:
    """The same for finished shards: of files in forms that the plan has, as those in others may be no part of it."""
    if not _has_text(config):
        return
    text_dir = Path(config.text_dir)
    for split in config.splits:
        _compare(folder, plan, config, split, sizes_now(text_dir, (facts.name for facts in plan.text[split])))


def _has_text(config: ShardsConfig) -> bool:
    return config.source == "folder" and bool(config.text_dir) and Path(config.text_dir).is_dir()


def _compare(folder: Path, plan: ShardsPlan, config: ShardsConfig, split: str, now: dict[str, int]) -> None:
    before = {facts.name: facts.bytes for facts in plan.text[split]}
    changed = [
        f"{name}: {before.get(name, 'no')} bytes there, {now.get(name, 'no')} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise DistlmError(
            f"{config.text_dir}: not the text of the shards in {folder} ({'; '.join(changed[:3])}); put the old text "
            "back, or choose another shards.folder or run_dir"
        )
