"""The start of `serve.engine=vllm`, and its refusals before anything starts.

The interpreter is this one, with a package in vLLM's place that says how it was started: the command is ours, and what
follows is vLLM's, which `test_real_engines.py` starts.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from adapter_models import config_for
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from server_process import save
from started import COMMAND, Started

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.commands import serve as serve_command
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.serving.vllm import PROBE
from lightning_peft.serving.vllm_middleware import SETTINGS

IN_ITS_PLACE = """
import importlib, json, os, signal, sys
module, _, name = sys.argv[sys.argv.index("--middleware") + 1].rpartition(".")
front = getattr(importlib.import_module(module), name)(None)
names = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_API_KEY")
said = {"pid": os.getpid(), "words": sys.argv[1:], "names": front.names(), "is": {n: os.environ.get(n) for n in names}}
said["files"] = [sys.modules[name].__file__ for name in sys.modules if name.startswith("lightning_peft")]
front.links.cleanup()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(json.dumps(said), flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hand_over")
    save(place / "a", config_for("lora", rank=8), 0.2)
    save(place / "b", config_for("lora", rank=12, rank_stabilized=True), 0.2)
    save(place / "dora", config_for("dora"), 0.1)
    save(place / "adalora", config_for("adalora"), 0.1)
    save(place / "norms", config_for("lora", trainable_modules=["norm"]), 0.1)
    save(place / "ranks", config_for("lora", rank=8, rank_pattern={"q_proj": 4}), 0.1)
    start = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    get_peft_model(load_model(ModelConfig("tiny"), torch.float32), start).save_pretrained(place / "pissa")
    save(place / "foreign", config_for("lora"), 0.1, "tiny_tied")
    shutil.copytree(place / "a", place / "nan")
    weights = place / "nan" / "adapter_model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(weights).items()}, weights)
    (place / "nan" / "lineage.json").unlink()
    shutil.copytree(place / "a", place / "layout")
    (place / "layout" / "prompt_layout.json").write_text('{"system_prompt": 3}')
    (place / "dir").mkdir()
    shutil.copytree(place / "a", place / "dir" / "c")
    for package in ("vllm", "vllm/entrypoints", "vllm/entrypoints/openai"):
        (place / "site" / package).mkdir(parents=True)
        (place / "site" / package / "__init__.py").write_text("")
    (place / "site" / "vllm/entrypoints/openai/api_server.py").write_text(IN_ITS_PLACE)
    return place


@pytest.fixture(autouse=True)
def interpreter_has_vllm(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place / "site"), os.environ.get("PYTHONPATH", "")]))


def words(place: Path, *names: str) -> list[str]:
    adapters = ",".join(f"{name}={place / name}" for name in names)
    return ["serve", "model=tiny", f"adapters=[{adapters}]", f"serve.python={sys.executable}", "precision=32-true"]


def command(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the words of the command that a dry run prints, its variables, and the lines before it."""
    assert main([*arguments, "serve.dry_run=true"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    env, *found = shlex.split(last)
    at = found.index(sys.executable)
    assert env == "env"
    return found[at:], dict(word.split("=", 1) for word in found[:at]), lines


def value(found: list[str], option: str) -> str:
    return found[found.index(option) + 1]


def refusal(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "execvpe", lambda *_: pytest.fail("it was started"))  # this process would become vLLM
        assert main(list(arguments)) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_prints_the_command_and_what_vllm_does_with_each_adapter(place, capsys):
    found, variables, lines = command(capsys, words(place, "a", "b"))
    assert lines == ["a: vLLM computes it rightly", "b: vLLM computes it rightly"]
    assert found[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert value(found, "--served-model-name") == "tiny"
    assert value(found, "--dtype") == "float32"
    assert (value(found, "--host"), value(found, "--port")) == ("127.0.0.1", "8000")
    assert value(found, "--max-num-seqs") == "16"
    modules = [json.loads(word) for word in found[found.index("--lora-modules") + 1 : found.index("--host")]]
    assert modules == [{"name": name, "path": str(place / name)} for name in ("a", "b")]
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    assert "VLLM_API_KEY" not in variables


def test_the_largest_rank_is_the_next_that_vllm_takes(place, capsys):
    assert value(command(capsys, words(place, "a"))[0], "--max-lora-rank") == "8"
    assert value(command(capsys, words(place, "a", "b"))[0], "--max-lora-rank") == "16"
    assert value(command(capsys, [*words(place, "a"), "serve.max_rank=33"])[0], "--max-lora-rank") == "64"


def test_slots_are_no_more_than_adapters_where_none_can_come(place, capsys):
    assert value(command(capsys, words(place, "a", "b"))[0], "--max-loras") == "2"
    found, variables, _ = command(
        capsys, [*words(place, "a"), f"adapter_dir={place / 'dir'}", "serve.slots=4", "serve.host_adapters=32"]
    )
    assert (value(found, "--max-loras"), value(found, "--max-cpu-loras")) == ("4", "32")
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_a_base_alone_has_no_adapters(place, capsys):
    assert "--enable-lora" not in command(capsys, words(place))[0]


def test_a_base_that_generates_otherwise_is_said_and_stops_where_it_says(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tmp_path / "base"
    load_model(ModelConfig("tiny"), torch.float32).save_pretrained(base)
    load_tokenizer(ModelConfig("tiny")).save_pretrained(base)
    own = {"eos_token_id": [2, 7], "repetition_penalty": 1.3, "temperature": 0.6, "do_sample": True, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(own))
    environments = []
    monkeypatch.setattr(os, "execvpe", lambda program, words, environment: environments.append(environment))
    assert main(["serve", "model=hf", f"model.path={base}", f"serve.python={sys.executable}"]) == 0
    settings = json.loads(Path(environments[0][SETTINGS]).read_text())
    assert settings["base_layout"]["stop_token_ids"] == [2, 7]
    said = "generation_config.json of the base sets repetition_penalty=1.3: answers here do not follow it"
    lines = capsys.readouterr().err
    assert said in lines and "temperature" not in lines


def test_options_are_vllms(place, capsys):
    given = ["serve.host=0.0.0.0", "serve.port=81", "serve.api_key=secret", "serve.max_length=100", "serve.max_batch=3"]
    found, variables, _ = command(capsys, [*words(place, "a"), *given, "precision=bf16-true"])
    assert (value(found, "--host"), value(found, "--port")) == ("0.0.0.0", "81")
    assert (value(found, "--max-model-len"), value(found, "--max-num-seqs")) == ("100", "3")
    assert value(found, "--dtype") == "bfloat16"
    assert variables["VLLM_API_KEY"] == "***"
    assert "secret" not in " ".join(found)


def test_an_adapter_that_vllm_reads_once_it_is_plain_is_said_to_become_so(place, capsys):
    found, _, lines = command(capsys, words(place, "adalora"))
    assert lines == ["adalora: vLLM computes it rightly, after `export format=plain`"]
    assert str(place / "adalora") not in " ".join(found)


@pytest.mark.parametrize(("version", "is_plain"), [("0.32.0", False), ("0.30.1", True), ("of unknown version", True)])
def test_ranks_of_layers_become_one_for_a_vllm_that_does_not_read_them(version, is_plain, place, capsys, monkeypatch):
    """vLLM up to 0.30 scales every layer as one of rank r, and says nothing."""
    monkeypatch.setattr(serve_command, "vllm_version", lambda _: version)
    found, _, lines = command(capsys, words(place, "ranks"))
    assert lines == [f"ranks: vLLM computes it rightly{', after `export format=plain`' if is_plain else ''}"]
    assert (str(place / "ranks") in " ".join(found)) is not is_plain


def test_a_start_that_hf_peft_repeats_becomes_a_part_of_the_change(place, capsys):
    """The folder has rank 4, what is handed over has twice that."""
    found, _, lines = command(capsys, words(place, "pissa"))
    assert lines == ["pissa: vLLM computes it rightly, after `export format=plain`"]
    assert value(found, "--max-lora-rank") == "8" and str(place / "pissa") not in " ".join(found)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "dora",
            "vLLM refuses it (DoRA): it has no DoRA; serve.engine=embedded serves it alone, `lightning-peft merge`",
        ),
        ("norms", "vLLM refuses it (trained modules): it reads no modules_to_save; serve.engine=embedded"),
        ("foreign", "this adapter was trained on tiny_tied"),
        ("nan", "has numbers that are not finite"),
        ("layout", "prompt_layout.json: not a prompt layout (system_prompt=3 is of another type)"),
    ],
)
def test_what_vllm_would_refuse_or_get_wrong_is_refused_before_it_starts(place, capsys, name, says):
    assert says in refusal(capsys, words(place, "a", name))
    assert says in refusal(capsys, [*words(place, "a", name), "serve.dry_run=true"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["model.attention=eager"], "model.attention=eager: vLLM has kernels of its own"),
        (["serve.host_adapters=2"], "serve.host_adapters=2 serve.slots=8: vLLM keeps on the host what is in slots"),
        (["serve.max_rank=513"], "serve.max_rank=513: vLLM takes ranks up to 512"),
        (["serve.max_rank=8"], "is of rank 12, vLLM has place for 8; start with serve.max_rank=12"),
        (["serve.max_length=100000"], "serve.max_length=100000: is above the model's context, 2048"),
        (["serve.engine=embedded"], "serve.engine=embedded serve.python="),
        (["serve.engine=vllm", "serve.python=null"], "serve.python=null: give serve.python="),
        (["serve.python=/nowhere/python"], "serve.python=/nowhere/python: is no Python interpreter that runs here"),
        (["adapter_dir=/nowhere"], "adapter_dir=/nowhere: no such folder"),
    ],
)
def test_options_that_vllm_cannot_honour_are_refused(place, capsys, given, says):
    assert says in refusal(capsys, [*words(place, "b"), *given])


def test_a_name_by_which_vllm_would_choose_for_the_base_is_refused(place, capsys):
    assert "is a kind of message part" in refusal(capsys, [*words(place), f"adapters=[text={place / 'a'}]"])


def test_an_interpreter_without_vllm_is_refused_or_left(place, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"].split(os.pathsep, 1)[1])
    assert "has no vLLM" in refusal(capsys, [*words(place, "a"), "serve.engine=vllm"])
    assert main([*words(place, "a"), "serve.dry_run=true"]) == 0
    said = capsys.readouterr()
    assert f"serve.engine=auto: embedded, as serve.python={sys.executable} has no vLLM" in said.err
    assert "would serve tiny, a" in said.out


def test_a_folder_called_vllm_is_no_vllm(tmp_path):
    (tmp_path / "vllm").mkdir()
    environment = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout == b""


def test_the_process_becomes_vllm_with_the_base_and_plain_adapters(place, tmp_path, monkeypatch):
    """Its pid, its signals and its exit status are vLLM's; what it is handed is written first.

    It is started in the folder of our sources, of which it imports nothing.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_API_KEY", "of the shell")
    given = [*words(place, "a", "adalora"), f"adapter_dir={place / 'dir'}"]
    process = Started(
        [*COMMAND, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
        cwd=Path(serve_command.__file__).parents[2],
    )  # fmt: skip
    try:
        lines = iter(process.stdout.readline, "")
        said = json.loads(next(line for line in lines if line.startswith("{")))
        assert said["pid"] == process.pid
        assert said["names"] == ["tiny", "a", "adalora", "c"]
        assert len(said["files"]) == 4
        assert all(Path(file).is_relative_to(tmp_path) for file in said["files"])
        assert said["is"] == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": None}
        base = ModelConfig("hf", value(said["words"], "--model"))
        assert {path.name for path in Path(base.path).iterdir()} >= {
            "config.json",
            "tokenizer.json",
            "model.safetensors",
        }
        plain = Path(json.loads(said["words"][said["words"].index("--lora-modules") + 2])["path"])
        config = json.loads((plain / "adapter_config.json").read_text())
        assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", base.path)
        assert read_lineage(plain).base_fingerprint == source_fingerprint(ModelConfig("tiny"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 7
    finally:
        process.kill()
        process.communicate()
