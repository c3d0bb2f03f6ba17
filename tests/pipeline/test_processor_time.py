"""What each start of a stage took of the cores, in metrics.jsonl."""

import shlex
import sys
from pathlib import Path

import pytest

from distlm.config.load import load_config
from distlm.errors import DistlmError
from distlm.pipeline import STEPS, run_step
from distlm.runtime.metrics import PROCESSOR_SECONDS
from distlm.runtime.rundir import RunDir
from distlm.runtime.stop import StopFlag

BUSY = "import time\nwhile time.process_time() < 0.3: pass"


def test_every_start_of_a_stage_records_the_processor_time_of_all_its_processes(tmp_path: Path) -> None:
    """Two ranks below a launcher, both of which have computed for 0.3 s when it fails."""
    config = load_config("demo", [f"run_dir={tmp_path / 'run'}"])
    rank = shlex.join([sys.executable, "-c", BUSY])
    launcher = ["sh", "-c", f"{rank} & {rank}; wait; exit 3"]
    for _ in range(2):
        with pytest.raises(DistlmError, match="stage 'data prepare' ended with exit code 3"):
            run_step(STEPS["data prepare"], config, launcher, StopFlag(), None)
    lines = list(RunDir.of(config).metrics.read())
    assert [line.stage for line in lines] == ["data prepare"] * 2
    for line in lines:
        spent = line.number(PROCESSOR_SECONDS)
        assert spent is not None and spent >= 0.6
