"""Whether the fine-tunings of a run are finished, and what they found. Without torch."""

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.finetune.records import FinetuneResults, FinetuneSettings
from distlm.memory.records import MemoryUse
from distlm.models.plm.config import FinetuneConfig
from distlm.runtime.rundir import RunDir

SETTINGS, RESULTS = "settings.json", "results.json"


def finetuned(config: RunConfig, run: RunDir) -> bool:
    """Whether results.json of every task has every seed, with these settings, from the checkpoint that is used now."""
    for one in config.section(FinetuneConfig).each():
        folder = run.finetune(one.name)
        if not (folder / RESULTS).exists() or not (folder / SETTINGS).exists():
            return False
        results = FinetuneResults.read(folder / RESULTS)
        if not {str(seed) for seed in one.seeds} <= results.seeds.keys():
            return False
        # The stage itself reports results that were made with other settings.
        if FinetuneSettings.read(folder / SETTINGS).setting_differences(one):
            return False
        if not one.checkpoint and not results.checkpoint.endswith(f"/{_newest(run)}"):
            return False
    return True


def require_ranks(config: RunConfig, ranks: int) -> None:
    """UsageError when the rows of an update do not divide over so many ranks."""
    from distlm.finetune.plan import plan_finetune_rows

    for one in config.section(FinetuneConfig).each():
        plan_finetune_rows(one, ranks)


def begun(config: RunConfig, run: RunDir) -> bool:
    """Whether an earlier start has done some of it."""
    return any(run.finetune(one.name).exists() for one in config.section(FinetuneConfig).each())


def _newest(run: RunDir) -> str:
    try:
        return run.newest_checkpoint().name
    except DistlmError:
        return "none"


def all_results(run: RunDir) -> list[FinetuneResults]:
    """Those of every fine-tuning in a run, by name."""
    return [FinetuneResults.read(path) for path in sorted(run.root.glob(f"finetune/*/{RESULTS}"))]


def results_text(results: FinetuneResults) -> str:
    """results.json for people."""
    lines = [f"finetune: {results.name}, dev, median of {len(results.seeds)} seeds (lowest to highest):"]
    for name, value in results.median.items():
        values = [found.last[name] for found in results.seeds.values()]
        lines.append(
            f"  {name:<24}{value:.4f}  ({min(values):.4f} to {max(values):.4f}); best epoch "
            f"{results.median_best_epoch[name]:.4f}; majority {results.majority[name]:.4f}"
        )
    for layer, use in results.memory.items():
        both = [(name, getattr(use.before, name), getattr(use.after, name)) for name in MemoryUse.NAMES]
        text = ", ".join(f"{name} {before:.3g} → {after:.3g}" for name, before, after in both)
        lines.append(f"  memory of layer {layer}, before → after: {text}")
    return "\n".join(lines)
