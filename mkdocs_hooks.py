"""Pages of the site that lie in the project's folder: CONTRIBUTING.md and CHANGELOG.md. Used by mkdocs.yml."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages. Their links to docs/ are links to their neighbours here."""
    for name in ROOT_PAGES:
        text = (Path(config.config_file_path).parent / name).read_text("utf-8")
        files.append(File.generated(config, name.lower(), content=text.replace("](docs/", "](")))
    return files
