"""The address at which the server listens: one that cannot be had is one line before a weight is read."""

import os
import re
import socket
import subprocess

import httpx
import pytest
from server_process import ended
from started import COMMAND, Started

from lightning_peft.__main__ import main


@pytest.mark.parametrize(
    ("host", "key", "says"),
    [
        ("127.0.0.1", [], "another program listens there; give another port, or serve.port=0 for any that is free"),
        ("192.0.2.1", ["serve.api_key=x"], "cannot assign requested address; give an address of this machine"),
        ("no-such-host.invalid", ["serve.api_key=x"], "; give an address of this machine"),
    ],
)
def test_address_that_cannot_be_had_is_one_line_before_a_weight_is_read(capsys, monkeypatch, host, key, says):
    monkeypatch.setattr("lightning_peft.commands.serve.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "model=tiny", f"serve.host={host}", f"serve.port={port}", *key]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: serve.host={host} serve.port={port}: ") and line.endswith(says)


@pytest.mark.slow
def test_port_zero_is_one_that_the_log_names():
    words = ["serve", "model=tiny", "serve.port=0", "precision=32-true"]
    process = Started([*COMMAND, *words], stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = (re.search(r"listens at (http://127\.0\.0\.1:\d+)", line) for line in process.stderr)
    address = next(found[1] for found in said if found)
    assert httpx.get(f"{address}/health").status_code == 200
    process.terminate()
    assert ended(process) == ""
