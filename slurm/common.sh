# shellcheck shell=bash
# What the scripts of this folder share; they source it inside their job. It
#   - finds Python and runs the site's set-up lines (docs/cluster.md; distlm site show),
#   - sets STEP, the srun flags of every step, PYTHON, the words that start a rank's interpreter, and LOG, the beginning of the names of the ranks' logs,
#   - defines `await` (wait for a step, hand signals on to it) and `finish` (end the job, or requeue it).
#
# Codes of a step: 0 done, 1 error, 2 usage, 75 stopped after a checkpoint; any other: a rank was killed (128 and the
# signal, or what MPI ends with when a peer is gone).

# shellcheck disable=SC2034,SC2154  # STEP and STOPPED are read by the scripts that source this file; they set `script`

# DISTLM_HOME: the project's folder. What lies there is what runs, not another installed copy.
DISTLM_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DISTLM_HOME PYTHONPATH=$DISTLM_HOME${PYTHONPATH:+:$PYTHONPATH}
# Python is that of the shell that called sbatch, else the one `make` installed; the site's lines may choose another.
python -c 'import yaml' 2>/dev/null || PATH=$DISTLM_HOME/.venv/bin:$PATH
setup=$(python -m launchers.site setup) || {
  echo "no site set-up from $(command -v python || echo 'any python'): activate distlm's environment, then call sbatch"
  exit 1
}
eval "$setup"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# How scontrol and squeue name this job. A task of an array has a number of its own, but one of those numbers is also
# the whole array's, and requeueing that requeues every task.
JOB=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Every rank compares the world it finds with this, so a step of another size ends at once. Set it before sbatch to be
# sure of the size yourself.
export DISTLM_RANKS=${DISTLM_RANKS:-$SLURM_NTASKS}

LOG=$SLURM_JOB_NAME-$JOB
STEP=(
  --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"  # Slurm 22.05 to 23.02 do not hand it from sbatch to srun
  --mpi="$SLURM_MPI_TYPE"                      # the site's `mpi`; set by its set-up lines
  --kill-on-bad-exit=0                         # a lost rank is noticed by the others, which say so and end ...
  --wait=120                                   # ... within launch.lost_after_s (60 s); srun ends what still hangs then
  --open-mode=append                           # a requeued job writes on
  --output="${LOG}_%t.log"                     # one log per rank
  "${SRUN[@]}"                                 # the site's `srun`
)

say() { echo "$(date +%FT%T) $JOB: $*"; }

say "$SLURM_JOB_NAME on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks, start $((${SLURM_RESTART_COUNT:-0} + 1))," \
    "requeue by this script; logs of the ranks: $PWD/${LOG}_*.log"

# For `distlm status`, `logs`, `cancel` and `requeue`. (`source` leaves the script its own "$@".)
stage=$(basename "${script:?set by the script that sources this}" .sbatch)
python -m launchers.jobs "${stage%-array}" --log "$PWD/${LOG}_0.log" "$@" || {
  [ $? != 75 ] || exit 75  # cancelled just as it was requeued
  say "this job could not be recorded"
}

# Signals that reach this shell only (`scancel --batch`, `--signal=B:`) are for the ranks.
STOPPED=""  # the signal that asked this job to stop, if any
SIGNALS=0   # how many came
hand_on() {
  STOPPED=$1
  SIGNALS=$((SIGNALS + 1))
  say "$1 received, handed on to the step"
  [ -z "${step:-}" ] || kill -USR1 "$step" 2>/dev/null
}
for name in INT HUP TERM USR1 USR2; do
  # shellcheck disable=SC2064  # the name is this round's
  trap "hand_on $name" "$name"
done

await() {  # SRUN_PID: waits for the step, returns its code
  local code before
  step=$1
  [ -z "$STOPPED" ] || kill -USR1 "$step" 2>/dev/null  # it came before there was a step to hand it on to
  # A signal ends `wait` early, with a code of its own. bash 5.2 loses that of a step that ends at this moment and says
  # 255: it counts as stopped, and the next start finds what is left, if anything is.
  while before=$SIGNALS; wait "$step"; code=$?; [ "$SIGNALS" != "$before" ]; do :; done
  [ -z "$STOPPED" ] || [ "$code" != 255 ] || code=75
  step=""
  return "$code"
}

finish() {  # CODE STAGE RECIPE [section.key=value ...]: ends this script
  local code=$1 stage=$2 state
  shift 2
  # Where Slurm is too busy to answer, the code alone decides.
  state=$(squeue -h -j "$JOB" -o %T) && [ -n "$state" ] || state=RUNNING
  # Not by the code alone: srun ends with 0 when the job is cancelled or requeued from outside.
  if [ "$code" = 0 ] && [ "$state" = RUNNING ]; then
    say "$stage: done"
    exit 0
  fi
  if [ "$code" = 1 ] || [ "$code" = 2 ]; then
    # Run again, it would end so again.
    say "$stage: failed with exit code $code:"
    last_errors
    exit "$code"
  fi
  if [ "$code" = 0 ] || [ "$code" = 75 ]; then say "$stage: stopped"; else say "$stage: a rank was killed (code $code)"; fi
  last_errors
  trap '' TERM  # Slurm now ends this shell and all it started, though there is a line left to say
  python -m launchers.again "$stage" "$@"
  code=$?
  exit "$((code == 0 ? 75 : code))"
}

array_share() {  # K/N of this task of an array
  if [ "$SLURM_ARRAY_TASK_MIN" != 0 ] || [ "$SLURM_ARRAY_TASK_MAX" != $((SLURM_ARRAY_TASK_COUNT - 1)) ]; then
    echo "this array is ${SLURM_ARRAY_TASK_MIN}-$SLURM_ARRAY_TASK_MAX in $SLURM_ARRAY_TASK_COUNT tasks, and shares are" \
         "counted 0, 1, 2, ...: submit with --array=0-$((SLURM_ARRAY_TASK_COUNT - 1))" >&2
    return 1
  fi
  echo "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
}

last_errors() {  # of each rank the last; those that say why come before those of ranks that saw another one end
  local log lines also='; this rank ends too\.'
  lines=$(for log in "$LOG"_*.log; do grep -hE '^(\[rank [^]]*\] )?distlm: ' "$log" 2>/dev/null | tail -n 1; done)
  { grep -v "$also" <<<"$lines"; grep "$also" <<<"$lines"; } | grep . | head -n 3
}
