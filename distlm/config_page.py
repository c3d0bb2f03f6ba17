"""docs/configuration.md from the schema: `python -m distlm.config_page > docs/configuration.md`. A test compares."""

from distlm.config.recipe import recipe_names
from distlm.config.settings import Section, all_sections

_HEAD = """# Every setting

Made from the code by `python -m distlm.config_page`; a test compares. A setting is given as `section.key=value` behind
a recipe, or stands in a YAML file of yours. The command line overrides the recipe, and the recipe the default:

```sh
distlm config wikitext2-small train.lr=0.001      # what a run would use
distlm config wikitext2-small --diff              # only what differs from the defaults
```

Bounds are checked before anything starts; a wrong name or value is one line that says what is right.
"""


def page() -> str:
    """The page as Markdown."""
    lines = [_HEAD, f"Recipes: {', '.join(f'`{name}`' for name in recipe_names())}.", ""]
    for section in all_sections():
        lines += _of_section(section)
    return "\n".join(lines).rstrip("\n") + "\n"


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
