"""Kubernetes: a Job whose pods are the nodes of one run, or each a trial of a sweep.

A pod that is evicted, or whose node is taken away, is told so first; the run saves and leaves with status 75. The Job
counts neither that nor the loss of a node as a failure, and starts the pod again, which goes on from the checkpoint.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.cluster.documents import yaml_text
from lightning_peft.cluster.job import SAVED, SECONDS, Cluster, ClusterConfig, ClusterError, Commands, Job, JobSpec
from lightning_peft.cluster.supervised import PORT, check_draws_nothing, check_is_shared, script

KUBECTL = Commands(
    "Kubernetes' command has to be on PATH here",
    f"no answer from Kubernetes in {SECONDS} s; kubectl get jobs shows what became of it",
)
NAME_LENGTH = 50
"""Longest name of a Job; its pods' names, with a number and five letters more, are names of hosts, of up to 63."""
CONTAINER = "train"
WRONG_INPUT = 2
"""Exit status of `train` that is not to be started again."""
RESTARTS = 6
"""Number of times the nodes of one run may fail together: the nodes left over when one is lost do."""


@dataclass
class KubernetesConfig(ClusterConfig):
    """The place on Kubernetes where `submit` runs a training, and the resources its pods ask for."""

    name: str = "kubernetes"
    image: str = ""
    """Container image with this program in it; required."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Path to the claim (PersistentVolumeClaim) that is mounted there, as {/runs: runs-claim}; this machine has to see
    the volume of the run's folder under the same path."""
    namespace: str | None = None
    """Namespace; null takes kubectl's."""
    gpu: str = "nvidia.com/gpu"
    """Resource that gpus_per_node counts."""
    cpus: str | None = None
    """CPU cores of a node, as "8" or "500m"; null leaves it to the cluster."""
    memory: str | None = None
    """Memory of a node, as 64Gi; null leaves it to the cluster."""
    shared_memory: str | None = "8Gi"
    """Size of /dev/shm, which ranks and data loaders use; null takes the container's 64 MiB."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that may be taken, as {cloud.google.com/gke-spot: "true"}."""
    tolerations: list[str] = field(default_factory=list)
    """Keys of taints that do not keep the pods away, as [nvidia.com/gpu]."""
    secrets: list[str] = field(default_factory=list)
    """Secrets whose keys become environment variables, as [wandb] with WANDB_API_KEY in it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = next((path for path in self.volumes if not path.startswith("/")), None)
        if wrong is not None:
            raise ValueError(f"cluster.volumes={{{wrong}: {self.volumes[wrong]}}}: a path starts with /")


class Kubernetes(Cluster):
    """Jobs with indexed completions."""

    file = "job.yaml"
    cancels_tasks = False

    def check(self, config: ClusterConfig, work: JobSpec) -> None:
        assert isinstance(config, KubernetesConfig)
        if not config.image:
            raise ValueError("cluster.image: give the image of the pods, as cluster.image=me/lightning_peft:1")
        if config.nodes > 1 and work.run_dirs is not None:
            raise ValueError(
                f"cluster.nodes={config.nodes}: each trial of a sweep on Kubernetes is one pod; use cluster.nodes=1 "
                "with more cluster.gpus_per_node"
            )
        check_is_shared(config.volumes, work.folder, config.name)
        check_draws_nothing(config, work)

    def text(self, config: ClusterConfig, work: JobSpec) -> str:
        assert isinstance(config, KubernetesConfig)
        name = job_name(work.name)
        documents = [job(config, work, name)]
        if config.nodes > 1:
            documents.insert(0, service(config, name))
        return yaml_text(*documents)

    def submit(self, path: Path, work: JobSpec) -> str:
        written = KUBECTL.run("kubectl", "create", "--filename", str(path), "--output", "name")
        found = [line.partition("/") for line in written.split()]
        (name,) = [name for kind, _, name in found if kind.startswith("job")]
        document = next(iter(yaml.safe_load_all(path.read_text(encoding="utf-8"))))
        return job_id_of(document["metadata"].get("namespace"), name)

    def find(self, job_ids: Iterable[str]) -> dict[str, Job]:
        found: dict[str, Job] = {}
        for job_id in job_ids:
            kubectl, name = at(job_id)
            try:
                state = json.loads(KUBECTL.run(*kubectl, "get", "job", name, "--output", "json"))
                pods = KUBECTL.run(*kubectl, "get", "pods", "--selector", f"job-name={name}", "--output", "json")
            except ClusterError as error:
                if "NotFound" in str(error):
                    continue
                raise
            found |= {job.id: job for job in jobs_of(job_id, state, json.loads(pods)["items"])}
        return found

    def cancel(self, job_ids: Iterable[str]) -> None:
        """End whole jobs. A single trial leaves by the file that its pod watches for."""
        for job_id in (job_id for job_id in job_ids if "_" not in job_id):
            kubectl, name = at(job_id)
            KUBECTL.run(*kubectl, "delete", "job,service", name, "--wait=false", "--ignore-not-found")

    def how_to_cancel(self, job_id: str) -> str:
        kubectl, name = at(job_id)
        return " ".join([*kubectl, "delete", "job", name])


def job_name(name: str) -> str:
    """Return a name that Kubernetes takes, and that no other job has."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}"
    return f"{plain[: NAME_LENGTH - 7].rstrip('-')}-{secrets.token_hex(3)}"


def job_id_of(namespace: str | None, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name


def at(job_id: str) -> tuple[list[str], str]:
    """Return kubectl with the job's namespace, and the job's name."""
    namespace, _, name = job_id.rpartition("/")
    return ["kubectl", *(["--namespace", namespace] if namespace else [])], name


def metadata(config: KubernetesConfig, name: str) -> dict[str, Any]:
    return {"name": name} | ({"namespace": config.namespace} if config.namespace else {})


def service(config: KubernetesConfig, name: str) -> dict[str, Any]:
    """Return the service that gives the pods of a run their names: the ranks meet at NAME-0.NAME."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(config, name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": name},
            "ports": [{"name": "ranks", "port": PORT}],
        },
    }


def job(config: KubernetesConfig, work: JobSpec, name: str) -> dict[str, Any]:
    is_sweep = work.run_dirs is not None
    pods = work.tasks if is_sweep else config.nodes
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": min(pods, work.parallel or pods) if is_sweep else pods,
        # A trial that failed leaves the others alone; a run of several nodes begins again when one is lost.
        **({"backoffLimitPerIndex": 0, "maxFailedIndexes": pods} if is_sweep else
           {"backoffLimit": RESTARTS * pods if pods > 1 else 0}),
        "podFailurePolicy": {"rules": rules(is_sweep)},
        "template": {"spec": pod(config, work, name)},
    }  # fmt: skip
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata(config, name), "spec": spec}


def rules(is_sweep: bool) -> list[dict[str, Any]]:
    """Return the rules for a pod by the way it ended; other ends count as failures."""

    def on(status: int) -> dict[str, Any]:
        return {"containerName": CONTAINER, "operator": "In", "values": [status]}

    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": on(SAVED)},
        {"action": "FailIndex" if is_sweep else "FailJob", "onExitCodes": on(WRONG_INPUT)},
    ]


def pod(config: KubernetesConfig, work: JobSpec, name: str) -> dict[str, Any]:
    number = "$JOB_COMPLETION_INDEX"
    text = script(
        config,
        work,
        task=f"{job_id_of(config.namespace, name)}_{number}",
        number="JOB_COMPLETION_INDEX",
        node=number,
        first_node=f"{name}-0.{name}",
    )
    limits = {"cpu": config.cpus, "memory": config.memory}
    limits |= {config.gpu: str(config.gpus_per_node)} if config.gpus_per_node else {}
    limits = {key: value for key, value in limits.items() if value is not None}
    volumes: list[dict[str, Any]] = [
        {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(config.volumes.values())
    ]
    mounts = [{"name": f"volume-{number}", "mountPath": path} for number, path in enumerate(config.volumes)]
    if config.shared_memory is not None:
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    container = {
        "name": CONTAINER,
        "image": config.image,
        "command": ["bash", "-c", text.replace("$$", "$$$$")],  # Kubernetes takes one of two $ for itself
        "volumeMounts": mounts,
        **({"resources": {"limits": limits}} if limits else {}),
        **({"envFrom": [{"secretRef": {"name": secret}} for secret in config.secrets]} if config.secrets else {}),
    }
    return {
        **({"subdomain": name} if config.nodes > 1 else {}),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.grace,
        "containers": [container],
        "volumes": volumes,
        **({"nodeSelector": dict(config.node_selector)} if config.node_selector else {}),
        **({"tolerations": [{"key": key, "operator": "Exists"} for key in config.tolerations]}
           if config.tolerations else {}),
    }  # fmt: skip


def jobs_of(job_id: str, state: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> list[Job]:
    """Return a Job's tasks, and the Job itself, from what kubectl says of it and its pods."""
    status, completions = state.get("status", {}), state["spec"].get("completions", 1)
    done, failed = (indexes(status.get(key, "")) for key in ("completedIndexes", "failedIndexes"))
    phases: dict[int, str] = {}
    codes: dict[int, int] = {}
    starts: dict[int, int] = {}
    for each in pods:
        index = int(each["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", 0))
        phase = each.get("status", {}).get("phase", "Pending")
        starts[index] = starts.get(index, 0) + 1
        for container in each.get("status", {}).get("containerStatuses", []):
            if (ended := container.get("state", {}).get("terminated")) is not None and ended["exitCode"] != SAVED:
                codes[index] = ended["exitCode"]
        if phase in ("Pending", "Running") and phases.get(index) != "Running":
            phases[index] = phase
    is_over = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"} & {"Complete", "Failed"}

    def task(index: int) -> Job:
        word = {"Running": "RUNNING", "Pending": "PENDING"}.get(phases.get(index, ""), "PENDING")
        if index in done:
            word = "COMPLETED"
        elif index in failed or is_over:
            word = "FAILED"
        code = 0 if word != "FAILED" else codes.get(index, 1)
        return Job(f"{job_id}_{index}", word, code, max(starts.get(index, 1) - 1, 0))

    tasks = [task(index) for index in range(completions)]
    words = {each.state for each in tasks}
    whole = next((word for word in ("FAILED", "RUNNING", "PENDING") if word in words), "COMPLETED")
    if not is_over and whole == "FAILED":
        whole = "RUNNING"
    code = max((each.exit_code for each in tasks), default=0) if whole == "FAILED" else 0
    return [*tasks, Job(job_id, whole, code, sum(each.restarts for each in tasks))]


def indexes(text: str) -> set[int]:
    """Return the numbers that Kubernetes writes as 0-3,7."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
