"""`python -m distlm.config_page > docs/configuration.md`: that page from schema and recipes. A test compares."""

from distlm.config import load_config
from distlm.config.recipe import recipe_summaries
from distlm.config.schema import RunConfig
from distlm.config.settings import Section, all_sections
from distlm.errors import DistlmError
from distlm.models.registry import kind
from distlm.pipeline import STEPS, counted
from distlm.runtime.files import format_bytes

_HEAD = """# Every setting

Made from the code by `python -m distlm.config_page`; a test compares. A setting is given as `section.key=value` behind
a recipe, or stands in a YAML file of yours. The command line overrides the recipe, and the recipe the default:

```sh
distlm config wikitext2-small train.lr=0.001      # what a run would use
distlm config wikitext2-small --diff              # only what differs from the defaults
```

Bounds are checked before anything starts; a wrong name or value is one line that says what is right.
"""

_RECIPES = """## Recipes

[The corpora](text.md#the-corpora-of-the-papers) says where texts come from. *Ranks* is `launch.ranks`, with which
`distlm run` trains. *Possible* are the rank counts, up to 1,024, that divide the batch.

Memory is that of a training rank with *ranks* ranks, as `distlm plan` computes it before there is a text. Python and
torch themselves are not counted. The number of words is assumed, and a text with fewer words needs less. A GPU needs
about as much; the plan says what lies on it and what beside it.

Time depends on the machine: `distlm plan RECIPE data.text_dir=FOLDER` estimates it; with `--measure` it is measured.

| recipe | what | ranks | possible | memory of a rank |
|---|---|---|---|---|"""
_COUNTS = (*range(1, 129), 256, 512, 1024)


def page() -> str:
    """The page as Markdown."""
    lines = [_HEAD, _RECIPES, *(_of_recipe(name, what) for name, what in recipe_summaries().items()), ""]
    for section in all_sections():
        lines += _of_section(section)
    return "\n".join(lines).rstrip("\n") + "\n"


def _of_recipe(name: str, what: str) -> str:
    """The row of a recipe of the package."""
    config = load_config(name, [])
    possible = ", ".join(f"{count:,}" for count in _COUNTS if _takes(config, count))
    try:
        memory = format_bytes(counted(STEPS["train"], config).memory_bytes)
    except DistlmError:
        # The recipe hf names no model.
        memory = "by the model"
    return f"| `{name}` | {_cell(what)} | {config.launch.ranks} | {possible} | {memory} |"


def _takes(config: RunConfig, ranks: int) -> bool:
    """Whether a training's batch divides over so many ranks."""
    try:
        kind(config.model.kind).require_ranks(config, ranks)
    except DistlmError:
        return False
    return True


def _of_section(section: Section) -> list[str]:
    only = f" (`model.kind={section.kinds[0]}`)" if len(section.kinds) == 1 else ""
    lines = [f"## {f'`{section.name}`' if section.name else 'The run itself'}{only}", "", _cell(section.text), ""]
    if len(section.kinds) > 1:
        lines += [f"Read by models of kind {', '.join(section.kinds)}.", ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for setting in section.settings:
        default = _shown(setting.default)
        lines.append(f"| `{setting.key}` | {_cell(setting.type)} | {default} | {_cell(setting.text)} |")
    return [*lines, ""]


def _shown(default: object) -> str:
    return "empty" if default in ("", []) else f"`{default}`"


def _cell(text: str) -> str:
    # What looks like a tag or a column would be one.
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
