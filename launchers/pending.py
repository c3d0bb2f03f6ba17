"""What is left of a recipe, for the scripts in slurm/: one line per command, in order.

python -m launchers.pending [--stage STAGE] RECIPE [section.key=value ...]      prints lines STAGE all|one VERB
"""

import argparse
import sys
from collections.abc import Sequence

from distlm.config.load import load_config, split_words
from distlm.errors import DistlmError
from launchers.site import SERIAL, check_stage
from launchers.stages.graph import SPECS, pending_stages


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m launchers.pending", description="What is left of a recipe.")
    parser.add_argument("--stage", help="only this stage, finished or not")
    parser.add_argument("words", nargs="+", metavar="RECIPE section.key=value", help="in any order")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(*split_words(options.words))
        for stage in pending_stages(config) if options.stage is None else [check_stage(options.stage)]:
            for verb in SPECS[stage].verbs_of(config):
                print(stage, "one" if stage in SERIAL else "all", verb)
    except DistlmError as error:
        print(f"launchers.pending: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
