"""python index.py STAGE RUN_DIR [section.key=value ...]: an index stage on these ranks, in small merge units."""

import os
import sys

from distlm.config import load_config
from distlm.errors import DistlmError
from distlm.runtime.stage import open_stage


def main() -> int:
    action, run_dir, *overrides = sys.argv[1:]
    config = load_config(
        "demo", [f"run_dir={run_dir}", f"index.folder={run_dir}/index", "launch.threads=1", *overrides]
    )
    try:
        with open_stage("index", config) as stage:
            import distlm.index
            import distlm.index.build.integer_lists
            import distlm.index.merge.stage
            import distlm.index.merge.write

            if os.environ.get("TEST_INTEGERS"):
                # As in a large index.
                distlm.index.build.integer_lists.LEAST_WORK = distlm.index.build.integer_lists.LEAST_LISTS = 0
            distlm.index.merge.stage.UNIT_BYTES = int(os.environ.get("TEST_UNIT_BYTES", "20000"))
            # As many rounds as units, so that kills fall between them.
            distlm.index.merge.write.ROUND_UNITS = 1
            stage.comm.barrier()
            # Tests that kill count from here: the imports are over, the work begins.
            (stage.run.root / "started").touch()
            result = getattr(distlm.index, f"run_index_{action}")(stage)
    except DistlmError as error:
        print(f"distlm: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if stage.comm.rank == 0:
        print(result, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
