"""A server that answers what W&B's client asks to make a report, and keeps what it was sent."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

NOTHING: dict[str, Any] = {"edges": []}
PERSON = {
    "id": "1", "entity": "me", "username": "me", "name": "me", "email": "", "admin": False, "flags": "{}",
    "deletedAt": None, "apiKeys": NOTHING, "teams": NOTHING,
}  # fmt: skip
PROJECT = {
    "id": "2", "internalId": "UHJvamVjdDoy", "name": "ours", "entityName": "me", "createdAt": "2026-01-01T00:00:00",
    "isBenchmark": False, "user": PERSON,
}  # fmt: skip


class WandbServer(ThreadingHTTPServer):
    """Knows one person, `me`, with one project, `ours`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.reports: list[dict[str, Any]] = []
        self.is_refusing = False

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "viewer" in query:
            return {"data": {"viewer": PERSON}}
        if "upsertView" in query and self.is_refusing:
            return {"errors": [{"message": "permission\ndenied"}]}
        if "upsertView" in query:
            self.reports.append(variables)
            view = {
                "id": "Vmlldzox", "type": "runs", "name": "n", "displayName": variables["displayName"],
                "description": "", "project": PROJECT, "spec": variables["spec"], "user": {"username": "me"},
                "createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z", "locked": False,
            }  # fmt: skip
            return {"data": {"upsertView": {"view": view, "inserted": True}}}
        pages = {"edges": [{"node": PROJECT, "cursor": "x"}], "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return {"data": {"project": PROJECT, "models": pages}}


class Answers(BaseHTTPRequestHandler):
    """Answers of `WandbServer`."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        found = (
            {} if self.path != "/graphql" else self.server.answer(*map(json.loads(content).get, ("query", "variables")))
        )
        text = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
