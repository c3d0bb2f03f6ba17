"""Code that is copied out of this package: it needs no distlm, is clean, and says what cannot be copied."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from distlm.models.awd_lstm.exchange.exporter import WORD_MODEL as LSTM
from distlm.models.export import source
from distlm.models.export.source import Collector
from distlm.models.export.subclass import subclass
from distlm.models.plm.export.write import modeling
from distlm.models.transformer.export import WORD_MODEL as TRANSFORMER

ROOT = Path(__file__).resolve().parents[3]
HF = "distlm.models.hf.modeling:ReadsMemory"
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering")
CODES = [
    "transformer", "awd_lstm", "GPT2LMHeadModel", "LlamaForCausalLM",
    *(f"{family}{head}" for family in ("Bert", "Roberta", "DistilBert") for head in HEADS),
]  # fmt: skip


def code_of(name: str) -> str:
    """A module that is written into exported folders."""
    if name in ("transformer", "awd_lstm"):
        return (TRANSFORMER if name == "transformer" else LSTM).code.source
    model = getattr(transformers, name)
    if name.endswith(HEADS):
        return modeling(model, model.config_class).source
    return subclass(HF, model, model.config_class, "AutoModelForCausalLM").source


@pytest.mark.parametrize("name", CODES)
def test_the_copy_imports_nothing_of_ours(name: str) -> None:
    text = code_of(name)
    imported = [
        module.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        for module in ([node.module or ""] if isinstance(node, ast.ImportFrom) else
                       [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
    ]  # fmt: skip
    assert {"torch", "transformers"} <= set(imported) <= {"torch", "transformers", *sys.stdlib_module_names}
    # Training's own parts stay here.
    assert not {"Exchange", "Usage", "ValueTable", "DistlmError"} & {
        node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)
    }
    assert len(text.splitlines()) < 750


def test_the_copies_are_clean(tmp_path: Path) -> None:
    for name in CODES:
        (tmp_path / f"{name}.py").write_text(code_of(name), "utf-8")
    ruff = [str(Path(sys.executable).parent / "ruff")]
    for words in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [*ruff, *words, "--config", str(ROOT / "pyproject.toml"), str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules of a package `ours`, which the collector takes for this one."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("")
    (tmp_path / "ours" / "base.py").write_text(
        'import math as m\nfrom torch import nn\n\n# Why it is 3.\nSIZE = 3\n"""What it is."""\n\n\n'
        "class Base:\n    def kept(self):\n        return m.pi\n\n    def gone(self):\n        return nn.Linear(1, 1)\n"
    )
    (tmp_path / "ours" / "top.py").write_text(
        "from ours.base import SIZE, Base\nfrom ours.errors import Bad\n\n\n"
        "def used():\n    return SIZE\n\n\nclass Top(Base):\n    '''Raises Bad.'''\n\n    def run(self):\n"
        "        if used():\n            raise Bad('x')\n"
    )
    (tmp_path / "ours" / "errors.py").write_text("class Bad(Exception):\n    pass\n")
    (tmp_path / "ours" / "other.py").write_text("SIZE = 4\n\n\ndef other():\n    return SIZE\n")
    (tmp_path / "ours" / "inner.py").write_text("def inner():\n    from ours.base import SIZE\n    return SIZE\n")
    (tmp_path / "ours" / "alias.py").write_text("from ours.base import SIZE as N\n\n\ndef alias():\n    return N\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(source, "_PACKAGE", "ours")
    return tmp_path


def test_what_is_used_comes_first_and_what_is_not_stays(package: Path) -> None:
    text = (
        Collector({"ours.errors:Bad": "ValueError"}, {"ours.base:Base": ["gone"]}).add(["ours.top:Top"]).source("Head.")
    )
    assert text.startswith('"""Head."""\n\nimport math as m\n\n\n')
    assert '# Why it is 3.\nSIZE = 3\n"""What it is."""\n' in text
    assert text.index("class Base") < text.index("class Top") and "gone" not in text and "nn" not in text
    assert "raise ValueError('x')" in text and "'''Raises ValueError.'''" in text and "Bad" not in text
    scope: dict[str, object] = {}
    exec(text, scope)
    with pytest.raises(ValueError, match="x"):
        scope["Top"]().run()  # type: ignore[operator]


@pytest.mark.parametrize(("roots", "left_out", "said"), [
    (["ours.top:used", "ours.other:other"], {}, "SIZE is in ours.base and in ours.other: rename one of them"),
    (["ours.inner:inner"], {}, "ours.base is imported within a definition"),
    (["ours.alias:alias"], {}, "SIZE is imported under another name, N"),
    (["ours.base:Nothing"], {}, "ours.base does not define Nothing"),
    (["ours.base:Base"], {"ours.base:Base": ["absent"]}, "Base has no method absent to leave out"),
])  # fmt: skip
def test_what_cannot_be_copied_is_said(
    package: Path, roots: list[str], left_out: dict[str, list[str]], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Collector({}, left_out).add(roots)
