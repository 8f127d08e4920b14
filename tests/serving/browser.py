"""A headless Chromium over the pipe of its own protocol: opens an address, and evaluates scripts in the page."""

import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# The protocol is spoken over descriptors 3 and 4; no Python runs between fork and exec.
COMMAND = 'exec chromium "$@" 3<&{0} 4>&{1}'


class Browser:
    """A page in a browser of its own."""

    def __init__(self, address: str, profile: Path):
        asks, self.asks = os.pipe()
        self.answers, answers = os.pipe()
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            ["bash", "-c", COMMAND.format(asks, answers), "chromium", *words, "about:blank"],
            pass_fds=(asks, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(asks)
        os.close(answers)
        self.number, self.held = 0, b""
        target = self.call("Target.createTarget", url=address)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Return the result of a method of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        os.write(self.asks, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.held:
                read = os.read(self.answers, 1 << 16)
                assert read, "the browser is gone"
                self.held += read
            found, _, self.held = self.held.partition(b"\0")
            answer = json.loads(found)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def value(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        result = self.call("Runtime.evaluate", self.session, expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 120.0) -> None:
        """Wait until an expression in the page is true."""
        until = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < until, self.value("document.body.innerText")
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        os.close(self.asks)
        os.close(self.answers)
