"""`distlm` as a model of lm-evaluation-harness: a run, or a KnnLM, alone or with its neighbours.

    python -m distlm.integrations.lm_eval --model distlm --model_args run=runs/NAME,mixture=knn --tasks TASK

is lm_eval's own command line, with this model among its models. In Python:

    lm_eval.simple_evaluate(model=DistlmModel(knn_lm=knn), tasks=[...])
"""

from collections.abc import Iterable
from typing import Any

from distlm.errors import DistlmError, UsageError
from distlm.installed import install
from distlm.integrations.knn_lm import KnnLM
from distlm.integrations.reading import TextScorer, of_knn_lm, of_run
from distlm.runtime.ranks.device import accelerator

try:
    # First those of the package: it registers them only where there are none yet.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise DistlmError(f"this model is for lm_eval: {install('lm-eval')} ({error})") from error

MOST_TOKENS = 256
"""Tokens of a continuation where a task says nothing (max_gen_toks)."""


@register_model("distlm")
class DistlmModel(LM):
    """Likelihoods and continuations under a language model of distlm, or of Hugging Face with a KnnLM round it.

    Natural logarithms. A newline is the token that ends a line, and a text begins behind one, as everywhere in distlm.
    A rolling likelihood is that of `distlm knn evaluate` for a text that ends with a newline; of one that does not the
    last line's end is not predicted. What lm_eval then calls word perplexity counts words between spaces, and no line
    ends, so that it is above distlm's perplexity per word.
    """

    def __init__(
        self,
        run: str = "",
        knn_lm: KnnLM | None = None,
        mixture: str = "",
        settings: str = "",
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """`run`: a run directory; or `knn_lm`. `mixture`: lm, knn or knn_buckets, as in results.json; empty: knn of a
        run that was tuned, of a KnnLM what its `mixing` says.

        `settings` of the run as on the command line, several with semicolons between them (lm_eval has commas between
        arguments), which may name another question that was tuned: "index.name=small;knn.nprobe=8".
        `batch_size`: pairs of one forward pass; "auto" is 8. `device`: of torch, for a run; a GPU where there is none
        is passed over. Raises UsageError for neither or both of run and knn_lm, and as of_run and of_knn_lm.
        """
        super().__init__()
        if bool(run) == (knn_lm is not None):
            raise UsageError("DistlmModel: give run= or knn_lm=, and not both")
        if knn_lm is not None and settings:
            raise UsageError(f"settings={settings!r}: those of a run; a KnnLM is set up by its methods")
        if knn_lm is not None:
            self.scorer: TextScorer = of_knn_lm(knn_lm, mixture)
        else:
            self.scorer = of_run(run, mixture or "knn", [part for part in settings.split(";") if part])
            # lm_eval's command line says cuda where nothing was said, whatever the machine has.
            if device and (accelerator() is not None or not device.startswith("cuda")):
                self.scorer.scorer.model.to(device)
        self._batch = int(batch_size) if batch_size and str(batch_size).isdigit() else 8

    def loglikelihood(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Σ ln p of the continuation, whether it is what greedy search would give) of each (context, continuation)."""
        return self.scorer.continuations([request.args for request in requests], max(1, self._batch))

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ ln p of each whole text."""
        return [self.scorer.log_prob(request.args[0]) for request in requests]

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first string of `until` or a special token of the tokenizer.

        Read of a task's generation_kwargs: until, max_gen_toks, do_sample, temperature. Raises UsageError for others.
        """
        return [self._continued(*request.args) for request in requests]

    def _continued(self, context: str, given: dict[str, Any]) -> str:
        words = dict(given)
        until = words.pop("until", None) or []
        most = int(words.pop("max_gen_toks", MOST_TOKENS))
        sample, temperature = bool(words.pop("do_sample", False)), float(words.pop("temperature", 0.0) or 0.0)
        if words:
            raise UsageError(f"generation_kwargs {', '.join(sorted(words))}: only until, max_gen_toks, do_sample and "
                             "temperature are read here; take them out of the task")  # fmt: skip
        stops = [until] if isinstance(until, str) else list(until)
        return self.scorer.generate(context, stops, most, (temperature or 1.0) if sample else 0.0)


def main() -> None:
    """lm_eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    # Under its own name, so that the model is registered once.
    from distlm.integrations.lm_eval import main as of_module

    of_module()
