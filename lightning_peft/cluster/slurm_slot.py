"""The bash of a slot: a task of a job array that runs one trial after the other, as a pruned sweep gives it them."""

from lightning_peft.cluster.process import LEAVE

SECONDS_TO_START = 60
"""The part of a job's time that a further trial needs before it heeds the warning signal."""

SLOT = """\
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
# The folder given is a trial's, or one that lists several, which train together.
trials() {{ if [ -e "$run_dir/trials.txt" ]; then cat "$run_dir/trials.txt"; else echo "$run_dir"; fi; }}
written() {{ trials | while read -r trial; do ls "$trial/checkpoints" 2> /dev/null; done; }}
# A trial is to be gone on with unless it has said how it ended, is at a rung, or was cancelled.
saved() {{
  trials | while read -r trial; do
    [ -e "$trial/{leave}" ] || grep -Eqs '"status": "(paused|finished|failed|diverged)"' "$trial/result.json" ||
      echo "$trial"
  done
}}
# The sweep names the next trial once told which ended and how; it may have heard so, and its answer be lost.
ask() {{
  local attempt
  for attempt in 1 2 3; do
    {python} -m lightning_peft sweep ask {folder} "$@" && return
    is_running || return 1
    sleep "$((10 * attempt))"
  done
  return 1
}}
# No step is made any more near the job's end, and a warning between two trials is heard by none.
is_ending() {{
  [ -n "$told" ] || [ "$((${{SLURM_JOB_END_TIME:-$(($(date +%s) + 86400))}} - $(date +%s)))" -lt {least} ]
}}
was_preempted() {{
  trials | while read -r trial; do cat "$trial/result.json" 2> /dev/null; done | grep -q '"status": "preempted"'
}}

# A fresh start of this job has the same trial, unless the job was cancelled; it fails where that would go on for ever.
start_again() {{
  is_running || exit 75
  if stalls; then return 1; fi
  scontrol requeue "$job"
  exit 75
}}

ended=
report=()
worst=0
while true; do
  run_dir=$(ask "${{report[@]}}") || {{
    is_running || exit 75
    echo "error: the sweep could not be asked for a trial"
    exit 1
  }}
  [ -n "$run_dir" ] || exit "$worst"
  if [ -n "$ended" ]; then
    is_running || exit 75
    if is_ending; then
      scontrol requeue "$job"
      exit 75
    fi
  fi

  echo "slot $job: $run_dir"
  checkpoints=$(written)
  is_leaving=
  config=$run_dir/config.yaml
  [ ! -e "$run_dir/trials.txt" ] || config=$run_dir/trials.txt
  # The ranks get the environment of this script, also where sbatch was told to export nothing.
  srun --export=ALL --kill-on-bad-exit=1 {python} -m lightning_peft train config_path="$config" &
  ranks=$!
  while kill -0 "$ranks" 2> /dev/null; do
    sleep 1 & wait $!
    # `sweep cancel` of this trial; the slot goes on with another.
    if [ -e "$run_dir/{leave}" ] && [ -z "$is_leaving" ]; then
      is_leaving=1
      scancel --signal=USR1 "$job"
    fi
  done
  wait "$ranks"
  ended=$?

  case $ended in
    # Told to leave, and saved; or told before Python heeds a signal.
    75 | 138 | 140 | 143) [ -z "$(saved)" ] || start_again || ended=1 ;;
    # Also what srun says that makes no step any more; else what the trial itself ended with, before it could write how.
    1) if [ -n "$(saved)" ] && {{ is_ending || was_preempted; }}; then start_again || true; fi ;;
  esac
  # What ended because the job is ended is not for the sweep to judge.
  is_running || exit "$ended"
  if [ "$ended" -ne 75 ] && [ "$ended" -gt "$worst" ]; then worst=$ended; fi
  # Before the sweep is asked, which may list others in the same place.
  report=("ended=$ended" "trials=[$(trials | sed "s|.*/|'|; s|\\$|'|" | paste -sd ,)]")
done
""".replace("{leave}", LEAVE)
