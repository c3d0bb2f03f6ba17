"""Exported masked language models: `distlm export hf`, whole folders or none, and fine-tuning from one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import distlm
from support.export.old import save_old
from support.finetune import finetune_config, pretrained, run, write_sst2
from torch import Tensor

from distlm.errors import DistlmError
from distlm.finetune.source import open_source
from distlm.memory.values.exchange import Exchange
from distlm.models.plm.config import FinetuneConfig
from distlm.models.plm.export import from_pretrained, save_pretrained
from distlm.models.plm.io import load_plm
from distlm.models.plm.model import Plm
from distlm.runtime.files import read_json, write_json


def checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000007"


def rows() -> tuple[Tensor, Tensor]:
    """Tokens int64 [3, 9] and mask; the rows are of different lengths."""
    mask = torch.arange(9) < torch.tensor([9, 6, 2])[:, None]
    tokens = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    return tokens.masked_fill(~mask, 0), mask


def states(model: Plm) -> Tensor:
    """Last hidden states of the rows' text."""
    tokens, mask = rows()
    with torch.no_grad(), model.rows.set(None, mask):
        return model(tokens)[mask]


def export(run_dir: Path, out: Path, **options: Any) -> Any:
    return distlm("export", "hf", "plm-base", f"run_dir={run_dir}", "--out", str(out), **options)


@pytest.mark.parametrize("kind", ["none", "pkm", "resm"])
def test_the_command_writes_the_checkpoints_model(tmp_path: Path, kind: str) -> None:
    source, out = pretrained(tmp_path / "run", kind, **{} if kind == "none" else {"stale": "catch_up"}), tmp_path / "hf"
    assert f"export hf: checkpoint={checkpoint(source)} folder={out}" in export(source, out).stdout
    model = load_plm(checkpoint(source))[0]
    assert torch.equal(states(from_pretrained(out)), states(model))
    if kind == "none":
        tokens, mask = rows()
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(out, attn_implementation="eager").eval()
        with torch.no_grad():
            found = theirs.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(found[mask], states(model))
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == model.vocabulary
    again = export(source, out, check=False)
    assert again.returncode == 1 and f"{out}: not empty" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.multiprocess
def test_one_of_two_ranks_writes(tmp_path: Path) -> None:
    source, out = pretrained(tmp_path / "run"), tmp_path / "hf"
    assert export(source, out, ranks=2).stdout.count("export hf:") == 1
    assert torch.equal(states(from_pretrained(out)), states(load_plm(checkpoint(source))[0]))
    again = export(source, out, ranks=2, check=False)
    assert again.returncode == 1 and again.stderr.count(f"{out}: not empty") == 1, again.stderr
    assert "Traceback" not in again.stderr


def test_an_interrupted_export_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = load_plm(checkpoint(pretrained(tmp_path / "run")))[0], tmp_path / "hf"
    seen: list[str] = []

    def full(*given: Any) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("distlm.models.export.folder.ExportManifest.write", full)
        with pytest.raises(DistlmError, match=r"hf: no space left on the disk; free some"):
            save_pretrained(model, out)
    # What stood there meanwhile had another name, and is gone.
    assert sorted(seen) == [".hf.tmp", "run"] and [path.name for path in tmp_path.iterdir()] == ["run"]
    # A kill leaves it behind.
    (tmp_path / ".hf.tmp").mkdir()
    (tmp_path / ".hf.tmp" / "model.safetensors").write_bytes(b"cut")
    out.mkdir()
    save_pretrained(model, out)
    assert torch.equal(states(from_pretrained(out)), states(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.parametrize(("values", "save"), [("updated", save_pretrained), ("frozen", save_old)])
def test_finetuning_from_the_folder_is_that_from_the_checkpoint(tmp_path: Path, values: str, save: Any) -> None:
    source, data = pretrained(tmp_path / "pretrained", stale="catch_up"), write_sst2(tmp_path / "glue")
    save(load_plm(checkpoint(source))[0], tmp_path / "hf", source / "shards" / "tokenizer")
    results = []
    for name, place in (("a", source), ("b", tmp_path / "hf")):
        settings = (f"finetune.checkpoint={place}", "finetune.epochs=1", f"finetune.memory={values}")
        run(finetune_config(tmp_path / name, data, *settings))
        folder = tmp_path / name / "finetune" / ("SST-2" if values == "updated" else "SST-2-frozen")
        results.append(read_json(folder / "seed-1" / "result.json", ""))
    one, other = results
    assert other["epochs"] == one["epochs"] and other["memory"] == one["memory"] and one["memory"]


def test_a_rank_takes_its_columns_of_an_exported_memory(tmp_path: Path) -> None:
    from distlm.finetune.description import TaskModelConfig
    from distlm.finetune.model import TaskModel
    from distlm.memory.values.files import load_table

    model = load_plm(checkpoint(pretrained(tmp_path / "run")))[0]
    save_pretrained(model, tmp_path / "hf", tmp_path / "run" / "shards" / "tokenizer")
    source = open_source(FinetuneConfig(checkpoint=str(tmp_path / "hf")), tmp_path, tmp_path)
    assert source.folder is not None
    second = Exchange.alone()
    second.columns, second.column = 2, 1
    task = TaskModel(TaskModelConfig(source.backbone, source.memory), source.vocabulary, second)
    for layer, memory in task.memories.items():
        load_table(memory.table, source.folder, layer, moments=False)
        assert torch.equal(memory.table.values, model.memories[layer].table.values[:, 16:])


OLD = ["memory.json", "memory.safetensors", "memory-02-00000-00032.safetensors"]


@pytest.mark.parametrize("name", [*OLD, "distlm.json", "model.safetensors"])
def test_a_folder_without_a_file_of_its_memory_is_refused(tmp_path: Path, name: str) -> None:
    model = load_plm(checkpoint(pretrained(tmp_path / "run")))[0]
    (save_old if name in OLD else save_pretrained)(model, tmp_path / "hf")
    (tmp_path / "hf" / name).unlink()
    with pytest.raises(DistlmError, match=r"copy the whole (checkpoint )?folder"):
        from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("name", [*OLD[1:], "model.safetensors"])
def test_a_changed_bit_of_an_exported_memory_is_refused(tmp_path: Path, name: str) -> None:
    model = load_plm(checkpoint(pretrained(tmp_path / "run")))[0]
    (save_old if name in OLD else save_pretrained)(model, tmp_path / "hf")
    path = tmp_path / "hf" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    said = rf"{name}: damaged \(other content.*copy the whole folder"
    with pytest.raises(DistlmError, match=said):
        from_pretrained(tmp_path / "hf")
    with pytest.raises(DistlmError, match=said):
        open_source(FinetuneConfig(checkpoint=str(tmp_path / "hf")), tmp_path, tmp_path)


def test_a_memory_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(load_plm(checkpoint(pretrained(tmp_path / "run")))[0], tmp_path / "hf")

    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("distlm.models.complete.file_hash", denied)
    with pytest.raises(DistlmError, match=r"model\S+: permission denied; .* have its permissions changed"):
        from_pretrained(tmp_path / "hf")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_old(load_plm(checkpoint(pretrained(tmp_path / "run")))[0], folder)
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    for changed, fault in (
        ({key: value for key, value in weights.items() if key != name}, rf"no weight {name}"),
        ({**weights, "more": torch.zeros(1)}, "unknown weight more"),
        ({**weights, name: torch.zeros(3, 4)}, rf"{name} is \[3, 4\], \[32, 64\] by its configuration"),
    ):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(DistlmError, match=rf"hf: {fault}; .*do not belong together"):
            from_pretrained(folder)
    write_json(folder / "memory.json", {"format": 1, "memory": {}})
    with pytest.raises(DistlmError, match=r"memory\.json: not a memory of format 3; .*export the checkpoint again"):
        from_pretrained(folder)
