"""What the settings say about their text: the sections `data` and `shards` in one form."""

from collections.abc import Mapping
from dataclasses import dataclass

from distlm.config.schema import DataConfig
from distlm.data.shards.config import ShardsConfig
from distlm.data.tokens import SPLITS


@dataclass(frozen=True)
class TextChoice:
    """The text that a section of the settings names."""

    section: str
    """data or shards: errors name the settings of this section."""
    source: str
    """folder, demo or hub."""
    text_dir: str
    text_field: str
    hub_name: str
    hub_config: str
    hub_field: str
    splits: tuple[str, ...]
    """Those that are made."""
    documents: str
    """Rule by which lines fall into documents."""
    shares: Mapping[str, float]
    """Split that is made of train's documents → its share of them, in (0, 1)."""

    def origin(self, split: str) -> str:
        """The split whose text holds that of `split`."""
        return "train" if split in self.shares else split

    @property
    def read(self) -> tuple[str, ...]:
        """Splits of the source that are read."""
        return tuple(dict.fromkeys(map(self.origin, self.splits)))

    @property
    def rows_are_documents(self) -> bool:
        """Of .jsonl, .csv and .parquet files."""
        return self.documents in ("blank_line", "whole")

    @property
    def splitting(self) -> str:
        """For errors: how to get a split that is not there."""
        return f"{self.section}.valid_share and {self.section}.test_share split whole documents off train, e.g. 0.01"


def choice_of_data(config: DataConfig) -> TextChoice:
    """For token files, which need all three splits."""
    return _choice("data", config, SPLITS)


def choice_of_shards(config: ShardsConfig) -> TextChoice:
    """For shards."""
    return _choice("shards", config, tuple(config.splits))


def _choice(section: str, config: DataConfig | ShardsConfig, splits: tuple[str, ...]) -> TextChoice:
    shares = {"valid": config.valid_share, "test": config.test_share}
    return TextChoice(
        section, config.source, config.text_dir, config.text_field, config.hub_name, config.hub_config,
        config.hub_field, splits, config.documents, {split: share for split, share in shares.items() if share > 0},
    )  # fmt: skip
