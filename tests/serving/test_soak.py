"""Two thousand requests of twenty clients to one server: more adapters than slots, loads, unloads, clients that go."""

import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_models import config_for
from server_process import ended, save, start

pytestmark = pytest.mark.slow

REQUESTS, CLIENTS, ADAPTERS, TOKENS = 2000, 20, 10, 6
QUESTIONS = ("How many singers are there?", "List all.", "Show the names of all people, the oldest first.")
MOST_MIB = 24
"""Memory that the allocator may hold more at the end than after a quarter of the requests."""


def used(process: int) -> dict[str, float]:
    """Return memory in MiB, open files and threads of a process."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    return {"mib": int(status["VmRSS"].split()[0]) / 1024, "files": files, "threads": int(status["Threads"])}


class Client:
    """The work of one client: mostly questions, now and then something that a server must survive."""

    def __init__(self, url: str, number: int, expected: dict[tuple[str, str], str]):
        self.http = httpx.Client(base_url=url, timeout=300)
        self.draw, self.number, self.expected = random.Random(number), number, expected
        self.done: Counter[str] = Counter()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        answer = self.http.post(path, json=body)
        answer.read()
        return answer

    def body(self, name: str, question: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        return {"model": name, "messages": messages, "max_tokens": TOKENS, "temperature": 0} | more

    def answer(self, name: str, question: str) -> None:
        answer = self.post("chat/completions", self.body(name, question))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == self.expected[name, question], (name, question)

    def go(self, name: str, question: str) -> None:
        """Leave after the first piece of a long answer."""
        body = self.body(name, question, max_tokens=400, stream=True, temperature=1.0)
        with self.http.stream("POST", "chat/completions", json=body) as response:
            assert response.status_code == 200
            next(response.iter_lines())

    def load_and_unload(self, name: str, question: str) -> None:
        """Give an adapter a further name, ask by it, and take the name away."""
        own = f"own{self.number}"
        loaded = self.post("load_lora_adapter", {"lora_name": own, "lora_path": name})
        assert loaded.status_code == 200, loaded.text
        body = self.body(own, question)
        text = self.post("chat/completions", body).json()["choices"][0]["message"]["content"]
        assert text == self.expected[name, question]
        assert self.post("unload_lora_adapter", {"lora_name": own}).status_code == 200
        assert self.post("chat/completions", body).status_code == 404

    def be_wrong(self, name: str, question: str) -> None:
        wrong = self.draw.choice(
            ({"model": "nobody"}, {"model": "../a0"}, {"max_tokens": 9999}, {"max_tokens": -1}, {"messages": "hi"})
        )
        answer = self.post("chat/completions", self.body(name, question) | wrong)
        assert answer.status_code in (400, 404), answer.text

    def requests(self, count: int) -> None:
        for _ in range(count):
            acts = self.answer, self.go, self.load_and_unload, self.be_wrong
            (act,) = self.draw.choices(acts, (85, 6, 4, 5))
            act(*self.draw.choice(list(self.expected)))
            self.done[act.__name__] += 1


def test_a_server_stays_as_it_is(tmp_path):
    for number in range(ADAPTERS):
        rank = (2, 4, 8)[number % 3]
        save(tmp_path / "adapters" / f"a{number}", config_for("lora", rank=rank), 0.2 + 0.05 * number, seed=number)
    words = ["serve.slots=3", "serve.max_rank=8", "serve.host_adapters=5", "serve.max_queue=64", "serve.max_batch=8"]
    process, openai_client = start([f"adapter_dir={tmp_path}/adapters", "serve.allow_load=true", *words])
    url = str(openai_client.base_url)
    try:
        soak(url, process.pid)
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in ended(process)
    finally:
        openai_client.close()
        if process.poll() is None:
            process.kill()
            process.communicate()


def soak(url: str, process: int) -> None:
    expected = {(f"a{number}", question): "" for number in range(ADAPTERS) for question in QUESTIONS}
    with ExitStack() as stack:
        alone, *clients = (stack.enter_context(Client(url, number, expected)) for number in range(CLIENTS + 1))
        for name, question in expected:
            answer = alone.post("chat/completions", alone.body(name, question))
            expected[name, question] = answer.json()["choices"][0]["message"]["content"]
        assert len(set(expected.values())) > 2 * ADAPTERS  # an answer tells whose it is

        seen = []
        with ThreadPoolExecutor(CLIENTS) as pool:
            for _ in range(4):
                list(pool.map(lambda client: client.requests(REQUESTS // CLIENTS // 4), clients))
                seen.append(used(process))
        done = sum((client.done for client in clients), Counter())
        metrics = httpx.get(url.removesuffix("v1/") + "metrics").text
    print(dict(done), *seen, sep="\n")
    assert done.total() == REQUESTS and len(done) == 4 and min(done.values()) > 40
    assert seen[-1]["mib"] - seen[0]["mib"] < MOST_MIB
    assert seen[-1]["threads"] <= seen[0]["threads"] + 2 and seen[-1]["files"] <= seen[0]["files"] + 4
    assert 'status="5' not in metrics and "lightning_peft_requests_waiting 0" in metrics
