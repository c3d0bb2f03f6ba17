"""python train.py JOBS.json RESULTS.json: several trainings in one process per rank (tests/support/train.py)."""

import json
import sys
from pathlib import Path


def main() -> None:
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    from support.kinds import recipe_of

    from distlm.config import load_config
    from distlm.errors import DistlmError, Stopped
    from distlm.runtime.ranks.world import resolve_world
    from distlm.runtime.stage import open_stage

    world = resolve_world()
    found: list[dict[str, object]] = []
    for overrides in json.loads(jobs.read_text("utf-8")):
        config = load_config(recipe_of(overrides), overrides)
        try:
            with open_stage("train", config, world) as stage:
                from distlm.training.loop import run_train

                found.append(run_train(stage))
        except Stopped as stop:
            found.append({"stopped": str(stop)})
        except DistlmError as error:
            found.append({"error": str(error), "shared": error.shared})
            if not error.shared:
                break
    if world.rank == 0:
        results.write_text(json.dumps(found), "utf-8")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
