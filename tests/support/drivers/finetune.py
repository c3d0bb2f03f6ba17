"""python finetune.py JOBS.json RESULTS.json: several fine-tunings in one process per rank.

A job is a list of overrides over the recipe plm-base. Rank 0's results: the summary, or {"stopped": text}.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    from distlm.config import load_config
    from distlm.errors import Stopped
    from distlm.finetune.stage import run_finetune
    from distlm.runtime.ranks.world import resolve_world
    from distlm.runtime.stage import open_stage

    world = resolve_world()
    found: list[dict[str, object]] = []
    for overrides in json.loads(jobs.read_text("utf-8")):
        with open_stage("finetune", load_config("plm-base", overrides), world) as stage:
            try:
                found.append(run_finetune(stage))
            except Stopped as stop:
                found.append({"stopped": str(stop)})
    if world.rank == 0:
        results.write_text(json.dumps(found), "utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
