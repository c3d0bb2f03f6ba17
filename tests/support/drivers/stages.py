"""python stages.py JOBS.json: stages one after another in one process. A job is [recipe, verb, overrides]; the verb
`generate` continues "the" greedily into RUN_DIR/generated.txt."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    from distlm.config import load_config
    from distlm.errors import Stopped
    from distlm.runtime.ranks.world import resolve_world
    from distlm.runtime.stage import open_stage
    from distlm.verbs import STAGE_VERBS

    verbs = {verb.words: verb for verb in STAGE_VERBS}
    world = resolve_world()
    for recipe, words, overrides in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        config = load_config(recipe, overrides)
        if words == "generate":
            from distlm.knnlm.generate.stage import generation_text, run_generate
            from distlm.knnlm.generate.words import Sampling

            with open_stage("knn", config, world) as stage:
                sampling = Sampling(tokens=8, greedy=True, seed=1, top_p=1.0, shown=2, context=4)
                text = generation_text(run_generate(stage, "the", sampling, lm_only=False))
            (Path(config.run_dir) / "generated.txt").write_text(text, "utf-8")
            continue
        verb = verbs[words]
        if verb.recorded:
            config = _named(verb.recorded)(config, world.rank)
        try:
            with open_stage(verb.stage, config, world) as stage:
                _named(verb.function)(stage)
        except Stopped as stop:
            print(stop, file=sys.stderr)


def _named(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


if __name__ == "__main__":
    main()
