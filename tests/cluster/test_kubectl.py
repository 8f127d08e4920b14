"""Our files read and written again by Kubernetes' own client: what it does not know, it would leave out."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_peft.__main__ import main

OLDEST = (1, 29)
"""Version of Kubernetes in which a Job has backoffLimitPerIndex by default."""
EDITS = {"Job": ["set", "env", "SEEN=1"], "Service": ["set", "selector", "seen=1"]}
"""Commands of kubectl that change a document by themselves, for which they read it into their own types."""


@cache
def why_not() -> str | None:
    if shutil.which("kubectl") is None:
        return "kubectl not found"
    said = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True).stdout
    version = re.search(r"v(\d+)\.(\d+)", said)
    if version is None or tuple(map(int, version.groups())) < OLDEST:
        return f"kubectl is older than {'.'.join(map(str, OLDEST))}: {said.strip()}"
    return None


@pytest.fixture(autouse=True)
def kubectl() -> Iterator[None]:
    if reason := why_not():
        pytest.skip(reason)
    yield


def through_kubectl(document: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "document.yaml").write_text(yaml.safe_dump(document))
    first, second, edit = EDITS[document["kind"]]
    command = ["kubectl", first, second, "--local", "-o", "json", "-f", str(folder / "document.yaml"), edit]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def missing(written: Any, read: Any, place: str = "") -> list[str]:
    """Return the places of what one document says and the other does not."""
    if isinstance(written, dict):
        if not isinstance(read, dict):
            return [place]
        return [at for key, value in written.items() for at in missing(value, read.get(key), f"{place}.{key}")]
    if isinstance(written, list):
        if not isinstance(read, list) or len(read) != len(written):
            return [place]
        pairs = enumerate(zip(written, read, strict=True))
        return [at for number, (one, other) in pairs for at in missing(one, other, f"{place}[{number}]")]
    return [] if written == read else [f"{place}: {written!r} {read!r}"]


@pytest.mark.parametrize(
    "words",
    [
        ["cluster.gpus_per_node=1"],
        ["cluster.gpus_per_node=8", "cluster.nodes=2", "strategy=fsdp", "cluster.cpus=32", "cluster.memory=256Gi",
         "cluster.shared_memory=16Gi"],
        ["-m", "adapter.rank=2,4,8", "sweep.parallel=2", "cluster.secrets=[wandb]", "cluster.tolerations=[spot]",
         "cluster.node_selector={kind: spot}", "cluster.namespace=research"],
    ],
    ids=["run", "nodes", "sweep"],
)  # fmt: skip
def test_client_keeps_all_that_is_written(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["model=tiny", "cluster=kubernetes", "cluster.image=me/lightning_peft:1", f"run_dir={tmp_path}/My_Run"]
    assert main(["submit", *words, *common, f"cluster.volumes={{{tmp_path}: claim}}", "cluster.dry_run=true"]) == 0
    for document in yaml.safe_load_all(capsys.readouterr().out):
        done = through_kubectl(document, tmp_path)
        assert done.returncode == 0, done.stderr
        read = json.loads(done.stdout)
        if document["kind"] == "Service":  # the edit takes the selector's place
            document["spec"].pop("selector")
        assert missing(document, read) == []


def test_client_refuses_or_leaves_out_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=tiny", "cluster=kubernetes", "cluster.image=x", f"cluster.volumes={{{tmp_path}: claim}}"]
    assert main(["submit", *words, f"run_dir={tmp_path}/run", "cluster.dry_run=true"]) == 0
    (job,) = yaml.safe_load_all(capsys.readouterr().out)
    job["spec"]["completionsMode"] = "Indexed"
    assert missing(job, json.loads(through_kubectl(job, tmp_path).stdout)) == [".spec.completionsMode: 'Indexed' None"]
    job["spec"]["completions"] = "three"
    assert through_kubectl(job, tmp_path).returncode != 0
