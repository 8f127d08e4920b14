"""The bash that runs one start of a training where no `srun` does: in a pod of Kubernetes, on machines of SkyPilot.

The script starts the ranks of its node, hands signals on to them, lets a trial leave that was cancelled, ends all when
one fails, and says by its exit status how the start ended: 75 where the run is saved and is to go on.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path

from lightning_peft.cluster.job import TASK, ClusterConfig, JobSpec
from lightning_peft.cluster.process import LEAVE
from lightning_peft.cluster.stalls import stalls

PORT = 29500
"""The port on the first node at which the ranks of several nodes meet."""

BODY = """\
{setup}
# Options that the lines above have set are for those lines alone.
set +eu +o pipefail
cd {directory} 2> /dev/null || echo {directory} is not here, so relative paths count from "$PWD"
export {task_variable}={task}
run_dir={run_dir}
[ -d "$run_dir" ] || {{ echo "error: run_dir=$run_dir: no such folder here"; exit 1; }}
exec > >(tee -a "$run_dir/job.log") 2>&1
log=$!
# A container is gone with this shell: the log gets three seconds to be written to its end.
finish() {{ exec > /dev/null 2>&1; for _ in 1 2 3; do kill -0 "$log" || break; sleep 1; done; exit "$1"; }}
if [ -e "$run_dir/{leave}" ]; then echo "cancelled: not started"; finish 0; fi

written() {{ {written}; }}
checkpoints=$(written)
{stalls}
ranks=()
train() {{ {python} -m lightning_peft train {train} & ranks+=($!); }}
tell() {{ for rank in "${{ranks[@]}}"; do kill -s "$1" "$rank" 2> /dev/null; done; }}
# The signals are for the ranks; this shell outlives them.
trap 'tell TERM' TERM INT USR1 USR2
{start}

# The shell waits until the ranks have left: one that fails ends the others, and {leave} asks all to save and go.
status=0
declare -A codes
while [ "${{#codes[@]}}" -lt "${{#ranks[@]}}" ]; do
  sleep 1 & wait $!
  for rank in "${{ranks[@]}}"; do
    if [ -n "${{codes[$rank]:-}}" ] || kill -0 "$rank" 2> /dev/null; then continue; fi
    wait "$rank"
    codes[$rank]=$?
    case $status in 0 | 75) [ "${{codes[$rank]}}" -eq 0 ] || status=${{codes[$rank]}} ;; esac
  done
  if [ -e "$run_dir/{leave}" ] && [ -z "${{is_leaving:-}}" ]; then is_leaving=1; tell TERM; fi
  case $status in
    0 | 75) ;;
    # Those that lost another rank say so by themselves within seconds.
    *) waited=$((${{waited:-0}} + 1)); [ "$waited" -lt 15 ] || tell KILL ;;
  esac
done

if [ -e "$run_dir/{leave}" ]; then finish 0; fi
if [ "$status" -eq 75 ]; then
  if [ {node} = 0 ] && stalls; then finish 2; fi
fi
finish "$status"
"""


def script(config: ClusterConfig, work: JobSpec, task: str, number: str, node: str, first_node: str) -> str:
    """Return the bash of one start.

    `task`, the id of what it runs, `number`, which of the job's tasks that is, `node`, the number of this node, and
    `first_node`, where the ranks meet, are bash.
    """
    run_dir, train = shlex.quote(str(work.folder)), f"config_path={shlex.quote(str(work.folder / 'config.yaml'))}"
    python = shlex.quote(config.python or "python")
    if work.run_dirs is not None:
        run_dir = f'$(sed -n "$(({number} + 1))p" {shlex.quote(str(work.run_dirs))})'
        train = f'config_path="$run_dir/{"trials.txt" if work.is_together else "config.yaml"}"'
    if work.is_asking:
        run_dir = f"$({python} -m lightning_peft sweep ask {shlex.quote(str(work.folder))})"
    start = "train"
    if config.nodes > 1:
        local = config.ranks_per_node
        start = (
            f"export MASTER_ADDR={first_node} MASTER_PORT=${{MASTER_PORT:-{PORT}}} GROUP_RANK={node}\n"
            f"export WORLD_SIZE={config.nodes * local} LOCAL_WORLD_SIZE={local}\n"
            f"for LOCAL_RANK in {' '.join(map(str, range(local)))}; do\n"
            f"  export LOCAL_RANK RANK=$((GROUP_RANK * {local} + LOCAL_RANK))\n"
            "  train\n"
            "done"
        )
    return BODY.format(
        setup="\n".join(config.setup),
        directory=shlex.quote(work.directory),
        task_variable=TASK,
        task=task,
        run_dir=run_dir,
        leave=LEAVE,
        written=work.written,
        stalls=stalls("more cluster.grace"),
        python=python,
        train=train,
        start=start,
        node=node if config.nodes > 1 else "0",
    ).lstrip("\n")


def check_is_shared(volumes: Mapping[str, str], work_folder: Path, cluster: str) -> None:
    """Raise ValueError where a run's folder does not stand in a volume, or this machine cannot see the volume.

    `volumes` has paths as keys, the same here and where the run will be.
    """
    place = next((path for path in volumes if work_folder.is_relative_to(path)), None)
    if place is None:
        raise ValueError(
            f"run_dir={work_folder}: cluster={cluster} keeps runs in a volume; give a folder below one of "
            f"cluster.volumes={dict(volumes) or '{}'}, as cluster.volumes={{{work_folder.parent}: NAME}}"
        )
    if not Path(place).is_dir():
        raise ValueError(
            f"cluster.volumes: {place} is no folder of this machine; mount the volume here too, under the same path, "
            "so that configs get there and results are seen"
        )


def check_draws_nothing(config: ClusterConfig, work: JobSpec) -> None:
    """Raise ValueError for tasks that would draw their trials: they cannot ask the cluster how the others stand."""
    if work.is_asking:
        raise ValueError(
            f"sweep.search=optuna cluster={config.name}: a trial is drawn from how the others ended, which its task "
            "cannot ask there; use grid or random, or cluster=slurm or local"
        )
