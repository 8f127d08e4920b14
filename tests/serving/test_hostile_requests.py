"""Requests that nobody should send: each gets one line and a status of the 400s, and the server goes on."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from adapter_models import config_for
from damaged_adapters import OTHER_TYPES, with_lineage
from safetensors.torch import load_file, save_file
from server_process import ask, ended, save, start

from lightning_peft.__main__ import main
from lightning_peft.data.layout import PromptLayout

HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"table": "singer"}'}}
CUT = {"type": "function", "function": {"name": "look", "arguments": "{"}}
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter, and a folder of others: a layout of wrong types, one not finite, one a link outside."""
    place = tmp_path_factory.mktemp("hostile")
    save(place / "a", config_for("lora", rank=8), 0.2)
    folder = place / "dir"
    for name in ("copy", "layout", "nan", "huge", "lineage", "tools", "raw"):
        shutil.copytree(place / "a", folder / name)
    (folder / "layout" / "prompt_layout.json").write_text('{"system_prompt": 3}')
    (folder / "lineage" / "lineage.json").write_text("[]")
    weights = folder / "nan" / "adapter_model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(weights).items()}, weights)
    (folder / "nan" / "lineage.json").unlink()
    weights = folder / "huge" / "adapter_model.safetensors"
    save_file({name: value * 1e30 for name, value in load_file(weights).items()}, weights)
    (folder / "huge" / "lineage.json").unlink()
    PromptLayout(template=WITH_TOOLS, stop_token_ids=[2]).save(folder / "tools")
    PromptLayout(kind="raw", stop_token_ids=[2]).save(folder / "raw")
    (folder / "link").symlink_to(place / "a")
    return place


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[openai.OpenAI]:
    words = [f"adapters=[a={place / 'a'}]", f"adapter_dir={place / 'dir'}", "serve.allow_load=true", "serve.slots=2"]
    process, client = start([*words, "serve.max_rank=16"])
    yield client
    process.send_signal(signal.SIGTERM)
    assert "Traceback" not in ended(process)


def post(client: openai.OpenAI, path: str, body: Any = None, raw: bytes | None = None) -> httpx.Response:
    content = raw if raw is not None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return httpx.post(f"{client.base_url}{path}", content=content, headers=headers, timeout=60)


def line(response: httpx.Response) -> str:
    message = response.json()["error"]["message"]
    assert message and "\n" not in message and len(message) < 4000
    return str(message)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "body: Field required"),
        (b'{"model": ', "body: is no JSON: Expecting value at character 10"),
        (b"\xff\xfe{}", "body: is no JSON: "),
        (b"[]", "body: Input should be a valid dictionary"),
        (b"[" * 100_000, "error parsing the body"),
        (b'{"model":"a","messages":[{"role":"user","content":"x"}],"temperature":NaN}', "temperature: "),
        (b'{"model":"a","messages":[{"role":"user","content":"\\ud800"}]}', "messages.0.content: half of a surrogate"),
        (b'{"model":"\\ud800","messages":[{"role":"user","content":"x"}]}', "model: half of a surrogate pair at char"),
    ],
)
def test_bodies_that_are_none(client: openai.OpenAI, raw: bytes, says: str) -> None:
    response = post(client, "chat/completions", raw=raw)
    assert response.status_code == 400
    assert says in line(response)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"max_tokens": 10**30}, "do not fit the model's 2048"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 2.5}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens=3 and max_completion_tokens=4 are one option"),
        ({"max_tokens": float("inf")}, "max_tokens: Input should be a valid integer"),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": "hot"}, "temperature: "),
        ({"n": 2}, "n: Input should be less than or equal to 1"),
        ({"logit_bias": {"1": 5}}, "logit_bias is not done here; leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format is not done here; leave it out"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: calls of them come as text here"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tool_choice: Input should be 'none' or 'auto'"),
        ({"messages": [{"role": "user"}]}, "messages.0: content: Field required"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0: content: Field required"),
        ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, "messages.0: tool_calls are the assistant's"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CUT]}]},
            "messages.0.tool_calls: expected JSON as arguments",
        ),
        ({"messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}, *HI]}, "template does not write tool calls"),
        ({"tools": [CALL], "tool_choice": "none"}, "the chat template does not write the tools of a conversation"),
        ({"presence_penalty": 1}, "presence_penalty is not done here; leave it out"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not done here; leave it out"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**63}, "seed: Input should be less than 9223372036854775808"),
        ({"stop": [f"s{number}" for number in range(100)]}, "should have at most 16 items"),
        ({"stop": [None]}, "stop"),
        ({"stream": "maybe"}, "stream: Input should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options is of a stream: it needs stream=true"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what: Extra inputs are not permitted"),
        ({"top_logprobs": 5}, "top_logprobs needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role: 'wizard' is no role; there are"),
        ({"messages": [{"role": "tool_call", "content": "x"}]}, "messages.0.role: 'tool_call' is no role; there are"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
            "messages.0.content: a part of type image_url is not read here",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content: a part of type None is not read"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "a part of type text is not read"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "x" * 10**7}]}, "bytes do not fit the model's 2048 tokens, "),
        ({"model": "layout"}, "not a prompt layout (system_prompt=3 is of another type)"),
        ({"model": "lineage"}, "lineage.json: lacks base_fingerprint"),
        ({"model": "nan"}, "has numbers that are not finite"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_values_of_other_kinds(client: openai.OpenAI, more: dict[str, Any], says: str) -> None:
    response = post(client, "chat/completions", {"model": "a", "messages": HI, "max_tokens": 3} | more)
    assert response.status_code == 400
    assert says in line(response)


@pytest.mark.parametrize("name", ["../a", "..", ".", "%2e%2e", "a/b", "/etc/passwd", "😀", "a\0b", "", "copy/", "\n"])
def test_names_that_are_paths_or_worse(client: openai.OpenAI, name: str) -> None:
    response = post(client, "chat/completions", {"model": name, "messages": HI})
    assert response.status_code == 404 and "not here; there are tiny, a, copy" in response.json()["error"]["message"]
    if name != "..":  # its own line says what lies there
        loaded = post(client, "load_lora_adapter", {"lora_name": name, "lora_path": "copy"})
        assert loaded.status_code == 400 and "letters, digits, dots" in loaded.text


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("../a", "must lie below"),
        ("link", "must lie below"),
        ("a\0b", "null byte"),
        ("y" * 10_000, "File name too long"),
        ("layout", "not a prompt layout"),
        ("nan", "not finite"),
        ("nothing", "no such folder"),
    ],
)
def test_folders_that_are_not_loaded(client: openai.OpenAI, path: str, says: str) -> None:
    response = post(client, "load_lora_adapter", {"lora_name": "new", "lora_path": path})
    assert response.status_code == 400 and says in response.json()["error"]["message"]
    assert post(client, "chat/completions", {"model": "new", "messages": HI}).status_code == 404


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0}, {"stream": True}, {"logprobs": True}], ids=str)
def test_an_adapter_whose_scores_are_not_finite_fails_alone(client: openai.OpenAI, more: dict[str, Any]) -> None:
    """Its weights are finite, its products are not: others in the batch are answered."""
    with ThreadPoolExecutor() as pool:
        other = pool.submit(ask, client, "a", "hi", 60)
        response = post(client, "chat/completions", {"model": "huge", "messages": HI, "max_tokens": 3} | more)
        assert response.status_code == 400
        assert line(response) == "the scores of the next token are not finite, so there is no answer"
        assert other.result()


@pytest.mark.parametrize(("change", "says"), [*OTHER_TYPES, (None, "maximum recursion depth")], ids=str)
def test_a_lineage_that_is_none_is_named(
    client: openai.OpenAI, place: Path, tmp_path: Path, change: dict[str, Any] | None, says: str
) -> None:
    with_lineage(place / "a", place / "dir" / tmp_path.name, change)
    response = post(client, "chat/completions", {"model": tmp_path.name, "messages": HI})
    shutil.rmtree(place / "dir" / tmp_path.name)
    assert (response.status_code, says in line(response)) == (400, True)


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-20])
def test_a_tiny_temperature_takes_the_likeliest_token(client: openai.OpenAI, temperature: float) -> None:
    assert ask(client, "a", "hi", 8, temperature=temperature, seed=3) == ask(client, "a", "hi", 8)


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_say_the_bytes_of_parts_of_characters(client: openai.OpenAI, streamed: bool) -> None:
    """A token of the tiny model is a byte."""
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": 40,
        "logprobs": 3,
        "temperature": 2.0,
        "seed": 0,
    }
    if streamed:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**body, stream=True)]
        said = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
        tokens, offsets = sum((s.tokens for s in said), []), sum((s.text_offset for s in said), [])
    else:
        found = client.completions.create(**body).choices[0].logprobs
        assert found is not None and {len(top) for top in found.top_logprobs or []} <= {2, 3}
        tokens, offsets = found.tokens, found.text_offset
    assert offsets == [sum(map(len, tokens[:n])) for n in range(len(tokens))]
    parts = [token for token in tokens if not token.isascii() or token.startswith("bytes:")]
    assert parts and all(re.fullmatch(r"bytes:\\x[89a-f][0-9a-f]", part) for part in parts)
    chat = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=40, logprobs=True, top_logprobs=2, temperature=2.0, seed=0
    )
    assert chat.choices[0].logprobs is not None
    found = chat.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes or []) for token in found).decode(errors="replace")
    assert text.startswith(str(chat.choices[0].message.content))


def test_models_are_said_while_their_folder_is_away(client: openai.OpenAI, place: Path) -> None:
    (place / "dir").rename(place / "away")
    try:
        assert {"tiny", "a"} <= {model.id for model in client.models.list()}
        response = post(client, "chat/completions", {"model": "copy", "messages": HI})
        assert response.status_code == 404
        assert ask(client, "a", "hi", 2) is not None
    finally:
        (place / "away").rename(place / "dir")


@pytest.mark.parametrize("name", ["tiny", "a"])
def test_a_name_is_that_of_one_adapter(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(place / "a", tmp_path / name)
    words = ["serve", "model=tiny", f"adapters=[a={place / 'a'}]", f"adapter_dir={tmp_path}", "serve.dry_run=true"]
    assert main(words) == 2
    assert "has that name" in (said := capsys.readouterr().err) or "the base's name; call it otherwise" in said


def test_the_base_keeps_its_name(client: openai.OpenAI) -> None:
    body = {"lora_name": "tiny", "lora_path": "copy", "load_inplace": True}
    assert "is the base's name" in line(post(client, "load_lora_adapter", body))


def test_null_is_what_is_left_out(client: openai.OpenAI) -> None:
    body = {"model": "a", "messages": HI, "max_tokens": 3}
    nulls = dict.fromkeys(("temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "logit_bias"))
    assert (
        post(client, "chat/completions", body | nulls).json()["choices"]
        == (post(client, "chat/completions", body).json()["choices"])
    )


def test_what_asks_for_nothing_is_no_error(client: openai.OpenAI) -> None:
    alone = client.chat.completions.create(model="a", messages=HI, max_tokens=9)
    unasked = client.chat.completions.create(
        model="a", messages=[{"role": "user", "content": [{"type": "text", "text": HI[0]["content"]}]}], max_tokens=9,
        n=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, response_format={"type": "text"}, tools=[],
        tool_choice="none", store=False, metadata={"of": "mine"}, safety_identifier="me", service_tier="auto",
        parallel_tool_calls=True, modalities=["text"],
    )  # fmt: skip
    assert unasked.choices == alone.choices
    text = client.completions.create(model="a", prompt="Once", max_tokens=4, best_of=1, echo=False, suffix="")
    assert text.choices == client.completions.create(model="a", prompt="Once", max_tokens=4).choices


def test_parts_of_a_message_stand_below_each_other(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "List"}, {"type": "text", "text": "all."}]
    found = [
        client.chat.completions.create(model="a", messages=[{"role": "user", "content": content}], max_tokens=9).choices
        for content in (parts, "List\nall.")
    ]
    assert found[0] == found[1]


def test_a_number_may_be_written_with_a_point(client: openai.OpenAI) -> None:
    body = {"model": "a", "messages": HI}
    plain = post(client, "chat/completions", body | {"max_tokens": 3, "seed": 7})
    pointed = {"max_tokens": 3.0, "max_completion_tokens": 3, "seed": 7.0, "n": 1.0}
    assert post(client, "chat/completions", body | pointed).json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    ("name", "role"),
    [("developer", "system"), ("human", "user"), ("Assistant", "assistant"), ("function", "tool"),
     ("ipython", "tool"), ("observation", "tool")],
)  # fmt: skip
def test_turns_have_the_authors_of_training_rows(client: openai.OpenAI, name: str, role: str) -> None:
    """The prompt is that of the role's own name: as long, and answered alike."""
    found = []
    for author in (name, role):
        turns = [{"role": author, "content": "Be short."}, *HI]
        response = post(client, "chat/completions", {"model": "a", "messages": turns, "max_tokens": 6})
        assert response.status_code == 200
        found.append((response.json()["choices"], response.json()["usage"]))
    assert found[0] == found[1]


def test_calls_of_tools_stand_in_the_prompt(client: openai.OpenAI) -> None:
    """As a row of training with the same turns and tools has them; what is then said is text."""
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    turns: Any = [
        {"role": "user", "content": "How many singers?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12"},
    ]
    answer = client.chat.completions.create(
        model="tools", messages=turns, tools=tools, tool_choice="none", max_tokens=3
    )
    call = '{"name": "look", "arguments": {"table": "singer"}}'
    text = (
        f"{json.dumps(tools)}<|im_start|>user\nHow many singers?<|im_end|>\n<|im_start|>assistant\n{call}<|im_end|>\n"
        "<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n"
    )
    told = client.completions.create(model="tools", prompt=text, max_tokens=3)
    assert answer.choices[0].message.content == told.choices[0].text
    assert answer.usage == told.usage


def test_tools_have_no_place_in_text_without_turns(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    body = {"model": "raw", "messages": HI, "tools": tools, "tool_choice": "none"}
    response = post(client, "chat/completions", body)
    assert (response.status_code, "no place for them" in line(response)) == (400, True)
    assert post(client, "chat/completions", body | {"tools": [], "max_tokens": 2}).status_code == 200


def test_bodies_have_a_size(client: openai.OpenAI) -> None:
    large = b'{"model":"a","messages":[{"role":"user","content":"' + b"x" * 2**24 + b'"}]}'
    assert post(client, "chat/completions", raw=large).status_code == 413
    endless = httpx.post(f"{client.base_url}chat/completions", content=iter([b"{", b"}"]), timeout=60)
    assert endless.status_code == 411 and "must say its length" in line(endless)


def test_a_body_that_is_not_said_to_be_json_is_named(client: openai.OpenAI) -> None:
    """As curl sends it without a header."""
    body = json.dumps({"model": "a", "prompt": "hi"}).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = httpx.post(f"{client.base_url}completions", content=body, headers={"content-type": kind}, timeout=60)
        assert (answer.status_code, line(answer)) == (400, f"content-type: {kind}: must be application/json")


def test_names_are_those_of_adapters_and_few_in_a_line(client: openai.OpenAI, place: Path) -> None:
    (place / "dir" / "logs").mkdir()
    for number in range(30):
        (place / "dir" / f"trial{number:02}").symlink_to(place / "a")
    try:
        found = [model.id for model in client.models.list()]
        assert "trial29" in found and "logs" not in found
        said = line(post(client, "completions", {"model": "nobody", "prompt": "x"}))
        assert said.count(",") == 19 and said.endswith(f" and {len(found) - 20} more")
        said = line(post(client, "completions", {"model": "logs", "prompt": "x"}))
        assert "neither a run nor an adapter folder" in said
    finally:
        (place / "dir" / "logs").rmdir()
        for path in (place / "dir").glob("trial*"):
            path.unlink()


def test_a_balancer_may_ask_for_health_by_its_head(client: openai.OpenAI) -> None:
    assert httpx.head(f"{str(client.base_url).removesuffix('v1/')}health").status_code == 200


def test_other_paths_and_verbs_are_said_in_the_same_form(client: openai.OpenAI) -> None:
    assert httpx.get(f"{client.base_url}nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{client.base_url}chat/completions").json()["error"]["message"] == "Method Not Allowed"


def test_a_model_is_retrieved_by_name(client: openai.OpenAI) -> None:
    assert client.models.retrieve("copy").model_dump()["parent"] == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_an_adapter_unloaded_or_changed_in_use_ends_as_it_began(client: openai.OpenAI, place: Path) -> None:
    """Its folder is written anew and loaded in place while a stream of it runs, then the name is taken away."""
    folder = place / "dir" / "moving"
    shutil.copytree(place / "a", folder)
    (folder / "lineage.json").unlink()
    assert post(client, "load_lora_adapter", {"lora_name": "used", "lora_path": "moving"}).status_code == 200
    expected = ask(client, "a", "List all.", 200)
    stream = client.chat.completions.create(
        model="used", messages=[{"role": "user", "content": "List all."}], max_tokens=200, stream=True
    )
    pieces = [next(iter(stream)).choices[0].delta.content or ""]
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: -3 * value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    assert post(client, "load_lora_adapter", {"lora_name": "used", "load_inplace": True}).status_code == 200
    changed = ask(client, "used", "List all.", 12)
    assert post(client, "unload_lora_adapter", {"lora_name": "used"}).status_code == 200
    assert post(client, "chat/completions", {"model": "used", "messages": HI}).status_code == 404
    pieces += [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == expected and not expected.startswith(changed)
    shutil.rmtree(folder)
