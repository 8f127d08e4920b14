"""vLLM itself behind `serve.engine=vllm`, asked by OpenAI's client. `make test-engines` brings it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from adapter_models import config_for
from safetensors.torch import load_file, save_file
from server_process import free_port, save
from test_real_engines import QUESTIONS, TOKENS, TRAINING, greedy, interpreter

from lightning_peft.checkpoint.lineage import read_lineage, write_lineage
from lightning_peft.checkpoint.peft_format import WEIGHTS_NAME, file_sha256
from lightning_peft.commands.adapted import layout_of, load_for_inference
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.models.source import ModelConfig

pytestmark = pytest.mark.engines

BASE = "smollm2_135m"
START_SECONDS = 900


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    client: openai.OpenAI
    place: Path
    log: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run, an AdaLoRA with another template, and a folder: the run's weights twice, a wrong base, a DoRA."""
    place = tmp_path_factory.mktemp("vllm")
    train(compose_config("train", [*TRAINING, f"run_dir={place}/run"]))
    save(place / "ada", config_for("adalora"), 0.02, BASE)
    other = place / "dir" / "other"
    shutil.copytree(place / "run" / "adapter", other)
    doubled = {name: 2 * tensor for name, tensor in load_file(other / WEIGHTS_NAME).items()}
    save_file(doubled, other / WEIGHTS_NAME, metadata={"format": "pt"})
    lineage = read_lineage(other)
    assert lineage is not None
    write_lineage(replace(lineage, adapter_sha256=file_sha256(other / WEIGHTS_NAME)), other)
    save(place / "dir" / "foreign", config_for("lora"), 0.1)
    shutil.copytree(place / "dir" / "foreign", place / "dir" / "unsigned")
    (place / "dir" / "unsigned" / "lineage.json").unlink()
    save(place / "dir" / "dora", config_for("dora"), 0.02, BASE)
    return place


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Served]:
    port, log = free_port(), place / "log.txt"
    words = [
        f"adapters=[run={place / 'run'},ada={place / 'ada'}]", f"adapter_dir={place / 'dir'}", f"model={BASE}",
        "serve.engine=vllm", f"serve.python={interpreter('VLLM')}", "serve.allow_load=true", "serve.api_key=secret",
        "serve.max_length=1024", f"serve.port={port}", "serve.slots=3", "precision=32-true",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lightning_peft", "serve", *words]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        for _ in range(START_SECONDS):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                time.sleep(1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0, timeout=600)
        yield Served(process, client, place, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(served: Served, model: str, question: str, **more: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return served.client.chat.completions.create(
        model=model, messages=messages, max_tokens=TOKENS, extra_body={"return_token_ids": True}, **more
    )


def expected(path: Path | None) -> tuple[list[list[int]], list[list[int]]]:
    """Return our prompts and greedy tokens, those up to where an answer ends."""
    adapter = None if path is None else str(path)
    model, tokenizer = load_for_inference(adapter, ModelConfig(BASE), "32-true")
    layout = layout_of(adapter, tokenizer)
    prompts = [layout.prompt(layout.conversation(question), tokenizer) for question in QUESTIONS]
    ends = {*layout.stop_token_ids, *layout_of(None, tokenizer).stop_token_ids}
    answers = greedy(model, prompts)
    stops = [next((at + 1 for at, token in enumerate(tokens) if token in ends), TOKENS) for tokens in answers]
    return prompts, [tokens[:stop] for tokens, stop in zip(answers, stops, strict=True)]


@pytest.fixture(scope="module")
def base_tokens() -> list[list[int]]:
    return expected(None)[1]


@pytest.mark.parametrize("name", ["run", "ada", "dir/other", None])
def test_prompts_and_greedy_tokens_are_ours(served: Served, base_tokens: list[list[int]], name: str | None) -> None:
    """They are so for two adapters named, one as plain LoRA it became, one read when asked for, and the base."""
    prompts, tokens = expected(None if name is None else served.place / name)
    answers = [ask(served, BASE if name is None else name.removeprefix("dir/"), question) for question in QUESTIONS]
    assert [answer.prompt_token_ids for answer in answers] == prompts
    assert [answer.choices[0].token_ids for answer in answers] == tokens
    assert name is None or tokens != base_tokens


def test_the_trained_system_prompt_is_added_where_a_chat_brings_none(served: Served) -> None:
    own = [
        {"role": "system", "content": "Translate the question to SQLite."},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    with_own = served.client.chat.completions.create(model="run", messages=own, max_tokens=TOKENS)  # type: ignore[arg-type]
    assert with_own.choices[0].message.content == ask(served, "run", QUESTIONS[0]).choices[0].message.content
    assert with_own.usage is not None
    assert with_own.usage.prompt_tokens == ask(served, "run", QUESTIONS[0]).usage.prompt_tokens
    assert with_own.usage.prompt_tokens != ask(served, BASE, QUESTIONS[0]).usage.prompt_tokens


def test_a_stream_is_the_answer(served: Served) -> None:
    whole = ask(served, "run", QUESTIONS[0]).choices[0].message.content
    assert (
        "".join(part.choices[0].delta.content or "" for part in ask(served, "run", QUESTIONS[0], stream=True)) == whole
    )


def test_models_are_the_base_and_its_adapters(served: Served) -> None:
    found = {model.id: model.model_dump()["parent"] for model in served.client.models.list()}
    assert found == {BASE: None} | dict.fromkeys(["run", "ada", "dora", "foreign", "other", "unsigned"], BASE)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("foreign", rf"this adapter was trained on tiny \(weights .*\), the model loaded is {BASE}"),
        ("unsigned", "the layer has .* inputs"),
        ("dora", "lora_magnitude_vector is no factor of a LoRA"),
    ],
)
def test_an_adapter_that_vllm_would_answer_as_the_base_with_is_refused(served: Served, name: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(served, name, QUESTIONS[0])


def test_an_unknown_model_is_404_with_the_names_there_are(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match=f"model=nobody: not here; there are {BASE}, run, ada"):
        ask(served, "nobody", QUESTIONS[0])


def test_an_adapter_loaded_anew_answers_with_its_new_weights(served: Served) -> None:
    """A prompt that vLLM has computed before with the former weights, too."""

    def load(path: str) -> httpx.Response:
        body = {"lora_name": "moving", "lora_path": path, "load_inplace": True}
        headers = {"authorization": "Bearer secret"}
        return httpx.post(f"{served.client.base_url}load_lora_adapter", json=body, headers=headers, timeout=600)

    folder = served.place / "dir" / "moving"
    shutil.copytree(served.place / "run" / "adapter", folder)
    assert load("moving").status_code == 200
    before = [ask(served, "moving", question).choices[0].token_ids for question in QUESTIONS]
    assert before == expected(served.place / "run")[1]
    shutil.rmtree(folder)
    shutil.copytree(served.place / "dir" / "other", folder)
    assert load("moving").status_code == 200
    after = [ask(served, "moving", question).choices[0].token_ids for question in QUESTIONS]
    assert after == expected(served.place / "dir" / "other")[1] != before


def test_sigterm_lets_an_answer_end_and_leaves_no_process(served: Served) -> None:
    """The last test: the process that was started is vLLM, and its session ends with it."""
    stream = iter(ask(served, BASE, "Tell a long story.", stream=True))
    next(stream)
    served.process.send_signal(signal.SIGTERM)
    assert [part.choices[0].finish_reason for part in stream][-1] in ("length", "stop")
    assert served.process.wait(timeout=180) == 0, served.log.read_text()[-3000:]
    for _ in range(20):  # the processes that vLLM has ended are taken away a moment later
        if not (left := in_session(served.process.pid)):
            break
        time.sleep(0.5)
    assert left == []


def in_session(number: int) -> list[str]:
    """Return the command lines of the processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[3]) == number:
                found.append((path / "cmdline").read_text())
        except (OSError, ValueError):
            continue  # it has ended since
    return found
