"""How clustered the states of frequent words are: likelihood under a Gaussian mixture, by loss (Ton et al., figure 3).

For each run a mixture of m Gaussians is fitted to a sample of the datastore's keys whose value is one of the most
frequent words; then every evaluated token with such a target gets the log-likelihood of its state, and those with a
high and with a low loss are compared. The paper says neither which tokens it takes, nor the covariance, and cuts the
losses at a figure without a unit; here all three are settings. States are divided by the standard deviation over all
coordinates of the sample, so that the log-likelihoods of a run whose penalty has shrunk the keys can be compared with
those of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.analysis.evaluations import Evaluation, open_evaluations, shown_of
from distlm.analysis.plots.groups import paired_histograms
from distlm.analysis.tables import markdown, write_csv, write_picture, write_text
from distlm.data.dictionary import Dictionary
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.installed import install
from distlm.knnlm.evaluate.losses import WORDS
from distlm.knnlm.search.neighbours import MANIFEST, written_units
from distlm.knnlm.search.states import COMMAND, States
from distlm.runtime.checked import require_whole
from distlm.runtime.ranks.comm import SingleComm

COMPONENTS = 10
"""m of the paper."""
_BINS = 60
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Settings:
    """What the paper leaves open."""

    words: int = 20
    """So many of the words that are most frequent in train."""
    rows: int = 20000
    """Keys that the mixture is fitted to, at most."""
    components: int = COMPONENTS
    covariance: str = "diag"
    """Of each Gaussian: diag or full."""
    threshold: float | None = None
    """Nats that part high from low losses; None: the median in the first evaluation."""
    seed: int = 1

    def check(self) -> None:
        """Raises UsageError."""
        for name, least in (("words", 1), ("components", 1), ("rows", self.components)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} {getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class Clusters:
    """Log-likelihoods of the evaluated states of one run."""

    label: str
    fitted: int
    """Keys that the mixture was fitted to."""
    high: Floats
    """Of tokens with a high loss: fp64 [n]."""
    low: Floats
    """Of tokens with a low loss: fp64 [n]."""

    @property
    def distance(self) -> float:
        """Difference of the means, low − high, in standard deviations of all."""
        return float((self.low.mean() - self.high.mean()) / np.concatenate([self.high, self.low]).std())

    @property
    def ordered(self) -> float:
        """How often a token with a low loss is the likelier one of two, ties counted half; 0.5: no difference."""
        above, below = (np.searchsorted(np.sort(self.high), self.low, side=side) for side in ("left", "right"))
        return float((above + below).mean() / (2 * len(self.high)))


def report_clusters(runs: Sequence[str], split: str, settings: Settings, out: Path | None) -> str:
    """Write the figure (`out`, .png; default: in the first run's folder), its histograms as .csv and the table as .md
    beside it; the table as text.

    runs: RUN_DIR (the losses of its LM) or RUN_DIR:NAME. Raises DistlmError as open_evaluations, and when a run has no
    datastore or no states of the split, when these are not as they were written, or scikit-learn is missing.
    """
    settings.check()
    evaluations = open_evaluations(runs, split, ("lm",))
    losses = evaluations[0].losses
    dictionary = Dictionary.load(losses.folder / WORDS)
    # Ids of words are by falling count, those of sub-words are not; specials, which are not counted, come before them.
    first = len(Dictionary.SPECIALS)
    order = np.argsort(-np.array(dictionary.counts[first:]), kind="stable")
    words = np.sort(order[: settings.words]) + first
    at = np.flatnonzero(np.isin(losses.targets, words))
    if not len(at):
        raise DistlmError(f"{losses.folder / split}: none of the {len(words)} most frequent words; take more --words")
    threshold = float(np.median(losses.nats[at])) if settings.threshold is None else settings.threshold
    found = [_clusters(evaluation, split, words, at, threshold, settings) for evaluation in evaluations]
    path = out or evaluations[0].run.root / f"clusters-{split}.png"
    histograms = {item.label: _histogram(item) for item in found}
    write_csv(
        path.with_suffix(".csv"),
        ["run", "loss", "from", "to", "tokens", "density"],
        [[label, group, *row] for label, parts in histograms.items() for group, rows in parts.items() for row in rows],
    )
    seen = _seen(found)
    x, y = "log-likelihood of the state, nats", "density per nat"
    write_picture(path, paired_histograms(histograms, x, y, seen))
    head = ["run", "keys fitted", "tokens, low loss", "tokens, high loss", "mean, low", "mean, high", "difference / sd",
            "low likelier"]  # fmt: skip
    rows = [[item.label, f"{item.fitted:,}", f"{len(item.low):,}", f"{len(item.high):,}", f"{item.low.mean():.2f}",
             f"{item.high.mean():.2f}", f"{item.distance:+.3f}", f"{item.ordered:.3f}"] for item in found]  # fmt: skip
    shown = " ".join(map(shown_of(evaluations[0].run, losses).word, words))
    text = (
        f"{markdown(head, rows)}\n\n{seen}\n\n{settings.components} Gaussians ({settings.covariance}); high: a loss "
        f"above {threshold:.3f} nats; words: {shown}"
    )
    write_text(path.with_suffix(".md"), text)
    return f"{text}\n\nfigure: {path}, data: {path.with_suffix('.csv')}"


def _seen(found: Sequence[Clusters]) -> str:
    """Which group lies in the denser places, in each run."""
    parts = "; ".join(f"{item.ordered:.0%} of all pairs in {item.label}" for item in found)
    return f"A token with a low loss has a likelier state than one with a high loss in {parts} (50%: as likely)."


def _clusters(
    evaluation: Evaluation,
    split: str,
    words: npt.NDArray[np.integer],
    at: npt.NDArray[np.integer],
    threshold: float,
    settings: Settings,
) -> Clusters:
    """`at`: places of the tokens whose target is one of `words`."""
    run = evaluation.run
    store = Datastore.open(run.datastore)
    searched = run.kept_neighbours(split)
    states = States.open(searched if (searched / MANIFEST).is_file() else run.states(split))
    store.require_model(states.manifest.model)
    if states.tap != store.tap or states.tokens != len(evaluation.losses.targets):
        raise DistlmError(
            f"{states.folder}: {states.tokens} states of {states.tap}; the losses are of "
            f"{len(evaluation.losses.targets)} tokens and the datastore's keys are {store.tap}: run `distlm knn "
            "search` and `distlm knn evaluate` again"
        )
    command = "distlm knn search" if states.folder == searched else COMMAND
    kept = written_units(states.folder, states.manifest.units, command)
    for root, files in ((store.folder, store.written()), (states.folder, kept)):
        require_whole(SingleComm(), root, files, "report clusters")
    keys = sample_keys(store, words, settings.rows, settings.seed)
    if len(keys) < settings.components:
        raise DistlmError(
            f"{store.folder}: {len(keys)} keys of the {len(words)} most frequent words are too few for "
            f"{settings.components} Gaussians; take more --words"
        )
    scale = float(keys.std())
    mixture = fit_mixture(keys / scale, settings)
    likelihood = mixture.score_samples(_rows(states, at) / scale)
    high = evaluation.losses.nats[at] > threshold
    if high.all() or not high.any():
        raise DistlmError(
            f"{evaluation.label}: every loss is {'above' if high.all() else 'at most'} {threshold:g} nats; choose "
            "another --threshold"
        )
    return Clusters(evaluation.label, len(keys), likelihood[high], likelihood[~high])


def sample_keys(store: Datastore, words: npt.NDArray[np.integer], rows: int, seed: int) -> Floats:
    """At most `rows` keys whose value is one of `words`, in corpus order, each with equal probability: fp64 [n, D]."""
    places = [np.flatnonzero(np.isin(store.values(shard.index), words)) for shard in store.shards]
    total = sum(map(len, places))
    chosen = np.arange(total)
    if total > rows:
        random = np.random.Generator(np.random.Philox(key=[2, seed]))
        chosen = np.sort(random.choice(total, rows, replace=False))
    keys, start = [], 0
    for shard, at in zip(store.shards, places, strict=True):
        here = chosen[(chosen >= start) & (chosen < start + len(at))] - start
        keys.append(np.asarray(store.keys(shard.index)[at[here]], np.float64))
        start += len(at)
    return np.concatenate(keys)


def fit_mixture(states: Floats, settings: Settings) -> Any:
    """scikit-learn's GaussianMixture fitted to states [n, D]. Raises DistlmError where scikit-learn is missing."""
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise DistlmError(f"Gaussian mixtures need scikit-learn: {install('plm')} ({error})") from error
    mixture = GaussianMixture(
        settings.components, covariance_type=settings.covariance, random_state=settings.seed, max_iter=200
    )
    return mixture.fit(states)


def _rows(states: States, at: npt.NDArray[np.integer]) -> Floats:
    """States of some tokens, rising places; only one unit is in memory at a time: fp64 [n, D]."""
    parts = []
    for first, last in zip(states.bounds[:-1], states.bounds[1:], strict=True):
        here = at[(at >= first) & (at < last)] - first
        parts.append(states.rows("queries", first, last)[here].astype(np.float64))
    return np.concatenate(parts)


def _histogram(item: Clusters) -> dict[str, list[tuple[float, float, int, float]]]:
    """Low and high → from, to, tokens and density of each bin; what lies beyond 999 of 1000 is in the last bins."""
    least, most = np.quantile(np.concatenate([item.high, item.low]), [0.001, 0.999])
    edges = np.linspace(least, most, _BINS + 1)
    found = {}
    for name, values in (("low", item.low), ("high", item.high)):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        density = counts / (len(values) * np.diff(edges))
        found[name] = [(float(a), float(b), int(n), float(d)) for a, b, n, d in
                       zip(edges[:-1], edges[1:], counts, density, strict=True)]  # fmt: skip
    return found
