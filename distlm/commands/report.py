"""Reports of finished runs, and what a model says: report …, generate."""

import argparse
from pathlib import Path

from distlm.commands.shared import Add, config_of, print_once, refuse_ranks, require_suffix
from distlm.errors import EXIT_DONE, UsageError
from distlm.runtime.progress import say
from distlm.runtime.ranks.world import World
from distlm.runtime.stage import open_stage


def add_verbs(add: Add) -> None:
    """report, report words, report frequency, report clusters, generate."""
    add("report", "write report.html from results.json and metrics.jsonl", _report, stage="knn")
    child = add("report words", "change of the loss by word between two evaluations", _report_words, stage="knn")
    child.add_argument(
        "--before", default="lm", help="a mixture of results.json, or RUN_DIR:NAME of another run; default lm"
    )
    child.add_argument("--after", default="cache", help="the same, of the second evaluation; default cache")
    child.add_argument("--split", default="", help="default: the first of knn.splits")
    child.add_argument("--top", type=int, default=20, help="words shown on either side; default 20")
    child.add_argument("--skip", type=int, default=0, help="leave out the first tokens, e.g. those without a cache")
    child.add_argument("--out", default="", help=".csv file; default: RUN_DIR/words-SPLIT-BEFORE-AFTER.csv")
    _add_figures(add)
    _add_generate(add)


def _add_figures(add: Add) -> None:
    """Figures of Ton et al. over any runs: they take run directories and no recipe."""
    for name, summary, handler in (
        ("frequency", "loss by word frequency, of the LM and the kNN-LM of any runs", _report_frequency),
        ("clusters", "likelihood of frequent words' states under a Gaussian mixture, by loss", _report_clusters),
    ):
        takes = ("RUN_DIR[:NAME]", "runs; NAME: lm, cache, knn or both")
        child = add(f"report {name}", summary, handler, takes=takes)
        child.add_argument("--split", default="valid", help="an evaluated split; default valid")
        child.add_argument("--out", default="", help=f".png file; default: RUN_DIR/{name}-SPLIT.png of the first run")
    child.add_argument("--words", type=int, default=20, dest="count", help="so many frequent words; default 20")
    child.add_argument("--rows", type=int, default=20000, help="keys that the mixture is fitted to; default 20000")
    child.add_argument("--components", type=int, default=10, help="Gaussians m; default 10, the paper's")
    child.add_argument("--covariance", choices=("diag", "full"), default="diag", help="of each; default diag")
    child.add_argument(
        "--threshold", type=float, help="nats that part high from low losses; default: the first run's median"
    )
    child.add_argument("--seed", type=int, default=1, help="of the sample and the fit; default 1")


def _add_generate(add: Add) -> None:
    child = add("generate", "continue a prompt without and with neighbours, and show them", _generate, stage="knn")
    child.add_argument("--prompt", default="", help="as in the text; words between spaces; default: none")
    child.add_argument("--tokens", type=int, default=40, help="words to generate; default 40")
    child.add_argument("--greedy", action="store_true", help="take the most probable word instead of drawing one")
    child.add_argument("--seed", type=int, default=1, help="of the draws; default 1")
    child.add_argument("--top-p", type=float, default=1.0, help="draw among the most probable words with this share")
    child.add_argument("--neighbours", type=int, default=5, help="shown behind each word; default 5")
    child.add_argument("--context", type=int, default=10, help="words shown of a neighbour's context; default 10")
    child.add_argument("--lm-only", action="store_true", help="no neighbours: needs neither datastore nor index")
    child.add_argument("--html", default="", metavar="FILE", help="also write a page with the neighbours of each word")


def _report(options: argparse.Namespace, world: World) -> int:
    config = config_of(options)
    from distlm.analysis.report import write_report
    from distlm.runtime.rundir import RunDir

    if world.rank:
        # In a job of several ranks it comes after a stage of all of them.
        return EXIT_DONE
    return print_once(f"wrote {write_report(RunDir.of(config))}", world)


def _report_words(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.evaluations import shown_of
    from distlm.analysis.words import open_evaluation, word_changes, words_table, write_csv
    from distlm.runtime.rundir import RunDir

    require_suffix("--out", options.out, ".csv")
    config = config_of(options)
    run, split = RunDir.of(config), options.split or config.knn.splits[0]
    before, after = (open_evaluation(text, run, split) for text in (options.before, options.after))
    rows = word_changes(before, after, options.skip, shown_of(run, before))
    names = "-".join(Path(text.replace(":", "/")).name for text in (options.before, options.after))
    out = Path(options.out) if options.out else run.root / f"words-{split}-{names}.csv"
    write_csv(rows, out)
    table = words_table(rows, options.top, f"{split}, {options.before} → {options.after}")
    return print_once(f"{table}\n\nall {len(rows)} words: {out}", world)


def _report_frequency(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.frequency import report_frequency

    return print_once(report_frequency(_runs(options, "frequency"), options.split, _picture(options.out)), world)


def _report_clusters(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.clusters import Settings, report_clusters

    settings = Settings(
        options.count, options.rows, options.components, options.covariance, options.threshold, options.seed
    )
    return print_once(
        report_clusters(_runs(options, "clusters"), options.split, settings, _picture(options.out)), world
    )


def _runs(options: argparse.Namespace, name: str) -> list[str]:
    if not options.words:
        raise UsageError(f"`distlm report {name}` needs runs: RUN_DIR or RUN_DIR:NAME, NAME is lm, cache, knn or both")
    words: list[str] = options.words
    return words


def _picture(out: str) -> Path | None:
    require_suffix("--out", out, ".png")
    return Path(out) if out else None


def _generate(options: argparse.Namespace, world: World) -> int:
    from distlm.knnlm.generate.stage import generation_text, run_generate
    from distlm.knnlm.generate.words import Sampling

    refuse_ranks(world, "generate", "is for one process")
    require_suffix("--html", options.html, ".html")
    sampling = Sampling(
        options.tokens, options.greedy, options.seed, options.top_p, options.neighbours, options.context
    )  # fmt: skip
    with open_stage("knn", config_of(options), world) as stage:
        made = run_generate(stage, options.prompt, sampling, options.lm_only)
    if options.html:
        from distlm.analysis.generation import write_page

        write_page(made, Path(options.html))
        say(f"wrote {options.html}")
    return print_once(generation_text(made), world)
