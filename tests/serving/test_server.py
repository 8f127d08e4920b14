"""The real server process, asked by OpenAI's own client: answers, streams, errors, and leaving."""

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from adapter_models import config_for
from browser import Browser
from safetensors.torch import load_file, save_file
from server_process import ask, ended, save, start

from lightning_peft.__main__ import main
from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.loading import load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import CHAT_TEMPLATE
from lightning_peft.serving.server import DOCS, PAGE

QUESTIONS = ("How many singers are there?", "List all.", "What is the largest?", "Show the names of all people.")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Train adapters on the tiny model, and a folder of more: a copy, a damaged one, one of another base, a DoRA."""
    place = tmp_path_factory.mktemp("serve")
    save(place / "a", config_for("lora", rank=8), 0.2)
    save(place / "b", config_for("lora", rank=4, rank_stabilized=True), 0.4)
    save(place / "dora", config_for("dora"), 0.1)
    save(place / "tied", config_for("lora"), 0.1, "tiny_tied")
    folder = place / "adapters"
    for name, source in (("copy", "a"), ("damaged", "a"), ("dora", "dora"), ("foreign", "tied")):
        shutil.copytree(place / source, folder / name)
    weights = folder / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return place


@pytest.fixture(scope="module")
def client(runs) -> Iterator[openai.OpenAI]:
    words = [f"adapters=[a={runs / 'a'},b={runs / 'b'}]", f"adapter_dir={runs / 'adapters'}", "serve.allow_load=true"]
    process, client = start([*words, "serve.slots=2", "serve.max_rank=16", "serve.max_queue=64"])
    yield client
    process.send_signal(signal.SIGTERM)
    ended(process)


def generated(runs: Path, adapter: str | None, capsys, tmp_path: Path, tokens: int = 12) -> list[str]:
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS) + "\n")
    source = ["model=tiny", *([] if adapter is None else [f"adapter_path={runs / adapter}"])]
    output = tmp_path / "answers.jsonl"
    words = [*source, f"prompt_path={tmp_path / 'prompts.txt'}", f"output={output}", "precision=32-true"]
    assert main(["generate", *words, f"sampling.max_new_tokens={tokens}"]) == 0
    return [json.loads(line)["answer"] for line in output.read_text().splitlines()]


def test_models_are_the_base_and_its_adapters(client):
    found = {model.id: model.model_dump()["parent"] for model in client.models.list()}
    assert found == {"tiny": None} | dict.fromkeys(["a", "b", "copy", "damaged", "dora", "foreign"], "tiny")


def test_answers_side_by_side_are_those_of_generate(client, runs, capsys, tmp_path):
    """Twelve requests at once to two adapters and the base, in two slots: each is what `generate` says alone."""
    expected = {name: generated(runs, name, capsys, tmp_path) for name in ("a", "b", None)}
    asked = [(name, question) for question in QUESTIONS for name in ("a", "b", None)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda pair: ask(client, pair[0] or "tiny", pair[1]), asked))
    for (name, question), answer in zip(asked, answers, strict=True):
        assert answer == expected[name][QUESTIONS.index(question)]
    assert len(set(answers)) > 3


def test_three_adapters_take_turns_in_two_slots(client):
    alone = {name: ask(client, name, QUESTIONS[0]) for name in ("a", "b", "copy")}
    assert alone["a"] == alone["copy"] != alone["b"]
    with ThreadPoolExecutor(9) as pool:
        names = ["a", "b", "copy"] * 6
        assert list(pool.map(lambda name: ask(client, name, QUESTIONS[0]), names)) == [alone[name] for name in names]


def test_stream_is_the_answer_in_pieces(client):
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="a", messages=messages, max_tokens=9, stream=True, stream_options=options
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(client, "a", QUESTIONS[0], 9) and len(chunks) > 5
    assert chunks[-1].usage.completion_tokens == 9 and chunks[-2].choices[0].finish_reason in ("length", "stop")


def test_a_stream_adds_up_to_its_message(client):
    """OpenAI's own adding of deltas made the role `assistantassistantassistant`."""
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    with client.chat.completions.stream(model="a", messages=messages, max_tokens=9) as stream:
        for _ in stream:
            pass
        message = stream.current_completion_snapshot.choices[0].message
    assert (message.role, message.content) == ("assistant", ask(client, "a", QUESTIONS[0], 9))


@pytest.mark.parametrize("asked", [{"include_usage": True}, {"include_usage": False}, None])
def test_usage_of_a_stream_is_null_until_its_last_chunk(client, asked):
    body = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
    more = {} if asked is None else {"stream_options": asked}
    with client._client.stream("POST", "chat/completions", json=body | more) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    if asked is None or not asked["include_usage"]:
        assert all("usage" not in chunk for chunk in chunks)
        return
    last = chunks.pop()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)


def test_stop_seed_and_logprobs(client):
    whole = ask(client, "a", QUESTIONS[0], 12)
    stop = whole[4:6]
    assert ask(client, "a", QUESTIONS[0], 12, stop=[stop]) == whole[: whole.index(stop)]
    drawn = [ask(client, "a", QUESTIONS[0], 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    answer = client.chat.completions.create(
        model="a", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 3 == answer.usage.completion_tokens and answer.usage.prompt_tokens > 10
    assert all(token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in tokens)


def test_text_is_continued_as_it_is(client):
    answer = client.completions.create(model="tiny", prompt="Once upon", max_tokens=5, logprobs=1)
    assert answer.usage.prompt_tokens == len("Once upon") and len(answer.choices[0].logprobs.tokens) == 5
    ids = load_tokenizer(ModelConfig("tiny"))("Once upon")["input_ids"]
    for prompt in (["Once upon"], ids, [ids]):
        assert (
            client.completions.create(model="tiny", prompt=prompt, max_tokens=5, logprobs=1).choices == answer.choices
        )
    with pytest.raises(openai.BadRequestError, match="prompt: one text is continued a request"):
        client.completions.create(model="tiny", prompt=["Once", "upon"])
    with pytest.raises(openai.BadRequestError, match="a token with the id 400"):
        client.completions.create(model="tiny", prompt=[400])


@pytest.mark.parametrize(
    ("model", "more", "status", "says"),
    [
        ("nobody", {}, 404, "model=nobody: not here; there are tiny, a, b, copy"),
        ("../a", {}, 404, "model=../a: not here"),
        ("damaged", {}, 400, "truncated or damaged"),
        ("foreign", {}, 400, "this adapter was trained on tiny_tied"),
        ("dora", {}, 400, "method dora is no file of low-rank pairs"),
        ("a", {"max_tokens": 5000}, 400, "do not fit the model's 2048"),
        ("a", {"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ("a", {"extra_body": {"top_k": 3}}, 400, "top_k: Extra inputs are not permitted"),
        ("a", {"stop": [""]}, 400, "stop: an empty text"),
    ],
)
def test_wrong_requests_get_a_status_and_a_line(client, model, more, status, says):
    with pytest.raises(openai.APIStatusError, match=says) as raised:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], **{"max_tokens": 4, **more}
        )
    assert raised.value.status_code == status
    assert ask(client, "a", "hi", 2) is not None  # and the server goes on


def test_adapters_are_loaded_and_unloaded_below_their_folder(client, runs):
    def post(verb: str, **body: object) -> httpx.Response:
        return httpx.post(f"{client.base_url}{verb}_lora_adapter", json=body, timeout=60)

    assert post("load", lora_name="more", lora_path="copy").status_code == 200
    assert ask(client, "more", QUESTIONS[0]) == ask(client, "a", QUESTIONS[0])
    assert "is loaded already" in post("load", lora_name="more", lora_path="copy").text
    for path in ("../a", str(runs / "a")):
        assert "must lie below" in post("load", lora_name="out", lora_path=path).text
    assert post("load", lora_name="bad/name", lora_path="copy").status_code == 400
    assert post("unload", lora_name="more").status_code == 200
    assert post("unload", lora_name="more").status_code == 404
    with pytest.raises(openai.NotFoundError):
        ask(client, "more", "hi")


def test_changed_file_is_read_when_it_is_loaded_in_place(client, runs):
    folder = runs / "adapters" / "changing"
    shutil.copytree(runs / "a", folder)
    (folder / "lineage.json").unlink()
    before = ask(client, "changing", QUESTIONS[0])
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: -3 * value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    body = {"lora_name": "changing", "load_inplace": True}
    assert httpx.post(f"{client.base_url}load_lora_adapter", json=body, timeout=60).status_code == 200
    assert ask(client, "changing", QUESTIONS[0]) != before
    shutil.rmtree(folder)


def test_an_adapter_whose_files_change_is_read_anew_with_its_prompt(client, runs):
    """As a training that writes its folder again does; half a file is an error until it is whole."""
    folder = runs / "adapters" / "written"
    shutil.copytree(runs / "a", folder)
    assert ask(client, "written", QUESTIONS[0]) == ask(client, "a", QUESTIONS[0])
    whole = (runs / "b" / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(openai.BadRequestError, match="adapter_model.safetensors"):
        ask(client, "written", QUESTIONS[0])
    for path in (runs / "b").iterdir():
        shutil.copy(path, folder)
    assert ask(client, "written", QUESTIONS[0]) == ask(client, "b", QUESTIONS[0])
    PromptLayout(system_prompt="Other.", template=CHAT_TEMPLATE, stop_token_ids=[2]).save(folder)
    messages = [{"role": "system", "content": "Other."}, {"role": "user", "content": QUESTIONS[0]}]
    expected = client.chat.completions.create(model="b", messages=messages, max_tokens=12).choices[0].message.content
    assert ask(client, "written", QUESTIONS[0]) == expected
    shutil.rmtree(folder)
    with pytest.raises(openai.NotFoundError):
        ask(client, "written", QUESTIONS[0])


def test_answers_without_a_seed_are_drawn_anew(client):
    """As OpenAI has it; with a seed they are the same."""
    drawn = {ask(client, "a", QUESTIONS[0], 12, temperature=1.5) for _ in range(4)}
    seeded = {ask(client, "a", QUESTIONS[0], 12, temperature=1.5, seed=7) for _ in range(4)}
    assert len(drawn) > 1 and len(seeded) == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_shows_two_adapters_beside_the_base(client, tmp_path):
    """A real browser asks the base and two adapters at once, twice, and shows what OpenAI's client gets."""
    turns = (
        "[...document.querySelectorAll('section')].map(s => [...s.querySelectorAll('.turn')].map(t => t.textContent))"
    )
    names = ("tiny", "b", "copy")
    first = {name: ask(client, name, "List all.", 8) for name in names}
    with Browser(f"{str(client.base_url).removesuffix('v1/')}?left=b&right=copy&tokens=8", tmp_path) as page:
        page.wait("document.querySelectorAll('section').length === 3")
        assert page.value("[...document.querySelectorAll('select')].map(s => s.value)") == ["b", "copy"]
        page.value("at('question').value = 'List all.', at('form').requestSubmit()")
        page.wait("document.body.dataset.answered === '3'")
        assert page.value(turns) == [["List all.", first[name]] for name in names]
        page.value("const s = document.querySelector('select'); s.value = 'damaged', s.onchange()")
        page.value("delete document.body.dataset.answered, send('And the names?')")
        page.wait("document.body.dataset.answered === '3'")
        base, damaged, copy = page.value(turns)
        assert base[2] == copy[2] == "And the names?" and len(copy) == 4
        assert damaged[0] == "And the names?" and "adapter_model.safetensors" in damaged[1]
    assert "http://" not in PAGE.read_text() and "https://" not in PAGE.read_text()


@pytest.mark.slow
def test_page_is_there_without_the_key_and_the_models_are_not(runs):
    process, client = start([f"adapters=[a={runs}/a]", "serve.api_key=secret"], "secret")
    try:
        address = str(client.base_url).removesuffix("/v1/")
        assert httpx.get(address).headers["content-type"].startswith("text/html")
        assert httpx.get(f"{address}/v1/models").status_code == 401
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_endpoints_are_a_page_without_a_network(client, tmp_path):
    with Browser(f"{str(client.base_url).removesuffix('v1/')}docs", tmp_path) as page:
        page.wait("document.body?.dataset.ready === '1'")
        text = page.value("document.body.innerText")
    for said in ("POST /v1/chat/completions", "GET /metrics", "temperature", "max_completion_tokens", "tool_call_id"):
        assert said in text
    assert "http://" not in DOCS.read_text() and "https://" not in DOCS.read_text()


def test_metrics_count(client):
    base = str(client.base_url).removesuffix("v1/")
    ask(client, "b", "hi", 3)
    text = httpx.get(f"{base}metrics").text
    assert 'lightning_peft_requests_total{model="b",status="200"}' in text
    assert "lightning_peft_requests_running 0" in text and "lightning_peft_requests_waiting 0" in text


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_takes_its_request_along(client, streamed):
    body = {"model": "a", "messages": [{"role": "user", "content": "List all."}], "max_tokens": 1500}
    base = str(client.base_url).removesuffix("v1/")

    def metric(name: str) -> int:
        return int(re.search(rf"lightning_peft_{name} (\d+)", httpx.get(f"{base}metrics").text)[1])

    before = metric("tokens_generated_total")  # the whole answer has 1,083
    if streamed:
        with httpx.stream("POST", f"{client.base_url}chat/completions", json={**body, "stream": True}) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{client.base_url}chat/completions", json=body, timeout=0.3)
    for _ in range(300):
        if metric("requests_running") == 0:
            break
        time.sleep(0.1)
    assert metric("tokens_generated_total") - before < 1000


@pytest.mark.slow
def test_key_full_queue_and_drain(runs):
    words = [f"adapters=[a={runs / 'a'}]", "serve.api_key=secret", "serve.max_batch=1", "serve.max_queue=1"]
    process, client = start(words, "secret")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    messages = [{"role": "user", "content": "hi"}]

    def long(_: int) -> object:
        try:
            options = {"temperature": 1.0, "logprobs": True}
            return client.chat.completions.create(model="a", messages=messages, max_tokens=300, **options)
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(long, number) for number in range(8)]
        while sum(future.done() for future in asked) < 6:  # one runs, one waits, the others are refused
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in asked]
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert refused and all(error.response.headers["retry-after"] == "1" for error in refused)
    assert len(refused) <= 7  # those that were taken on were answered
    ended(process)


@pytest.mark.slow
def test_what_is_not_low_rank_is_served_alone(runs):
    process, client = start([f"adapters=[d={runs / 'dora'}]"])
    assert [model.id for model in client.models.list()] == ["d"]
    assert ask(client, "d", "hi", 3)
    process.send_signal(signal.SIGTERM)
    assert "it is served alone, without its base" in ended(process)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "adapters=[]: give adapters"),
        (["adapters=[a]"], "adapters=a: must be name=path"),
        (["adapters=[a/b=runs]"], "adapters=a/b=runs: must be name=path"),
        (["adapters=[a=/no/where]"], "/no/where: no such folder"),
        (["model=tiny", "serve.host=0.0.0.0"], "serve.host=0.0.0.0: others could use it; give serve.api_key"),
        (["model=tiny", "serve.host=0.0.0.0", "serve.api_key=''"], "serve.api_key='': is empty"),
        (["model=tiny", "adapter_dir=/no/where"], "adapter_dir=/no/where: no such folder"),
        (["model=tiny", "serve.allow_load=true"], "serve.allow_load=true: give adapter_dir="),
        (["model=tiny", "serve.slots=0"], "serve.slots=0: must be at least 1"),
    ],
)
def test_wrong_words_get_one_line(words, says, capsys):
    assert main(["serve", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_is_served_in_one_command(tmp_path, capsys):
    """The base of its first trial, slots for its largest rank, every trial by its name, and their answers."""
    sweep = tmp_path / "sweep"
    words = ["model=tiny", "data.max_rows=8", "trainer.max_steps=1", "optimizer.lr=0.05", "adapter.rank=4,24"]
    options = ["trainer.accelerator=cpu", "trainer.precision=32-true", f"run_dir={sweep}"]
    assert main(["train", "-m", *words, *options]) == 0
    capsys.readouterr()
    assert main(["serve", f"adapter_dir={sweep}", "serve.dry_run=true"]) == 0
    assert capsys.readouterr().out == f"tiny: would serve tiny, what is in {sweep}; 8 slots of rank 24\n"
    process, client = start([f"adapter_dir={sweep}"], model=())
    try:
        names = {model.id for model in client.models.list()}
        assert names >= {"tiny", "rank4", "rank24"}
        for name in ("rank4", "rank24"):
            main(["generate", f"adapter_path={sweep / name}", "prompt=List all.", "sampling.max_new_tokens=8"])
            assert capsys.readouterr().out.rstrip("\n") == ask(client, name, "List all.", 8).rstrip("\n")
    finally:
        process.terminate()
        ended(process)


def test_a_folder_without_adapters_names_no_base(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    assert main(["serve", f"adapter_dir={tmp_path}", "serve.dry_run=true"]) == 2
    assert "has no adapter yet whose base could be taken; give model=" in capsys.readouterr().err


def test_dry_run_says_what_would_be_served(runs, capsys):
    assert main(["serve", "model=tiny", "serve.dry_run=true"]) == 0
    said = capsys.readouterr()
    assert said.out == "tiny: would serve tiny; 8 slots of rank 16\n" and "tiny with adapters none: 8" in said.err
    assert main(["serve", f"adapters=[a={runs / 'a'},b={runs / 'b'}]", "model=tiny", "serve.dry_run=true"]) == 0
    assert capsys.readouterr().out == "tiny: would serve tiny, a, b; 8 slots of rank 8\n"
