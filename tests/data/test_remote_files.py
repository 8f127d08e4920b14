"""Files that a web server has, on this machine."""

import json
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Thread

import fsspec
import pytest

from lightning_peft.data.config import DataConfig
from lightning_peft.data.files import NoSuchRows, find_files
from lightning_peft.data.sources import iterate_rows, rows_identity

pytest.importorskip("aiohttp")
ROWS = [{"prompt": f"Question {number}", "completion": "four " * 40} for number in range(2000)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Server(BaseHTTPRequestHandler):
    """Serves `TEXT` under names that say in which way."""

    protocol_version = "HTTP/1.1"
    asked = count()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name, _, query = self.path.partition("?")
        codes = {"/signed.jsonl": 200 if query == "key=a" else 403, "/gone.jsonl": 404, "/broken.jsonl": 500}
        body = TEXT if codes.get(name, 200) == 200 else b""
        if name == "/changing.jsonl":
            body = json.dumps({"text": f"{next(self.asked):05}"}).encode()
        self.send_response(codes.get(name, 200))
        if name == "/unmeasured.jsonl":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if name == "/cut.jsonl" else body)
            self.close_connection |= name == "/cut.jsonl"

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
    fsspec.filesystem("http").clear_instance_cache()


def read(path):
    return [row.values for row in iterate_rows(DataConfig(train_path=path, validation_fraction=0), "train")]


@pytest.mark.parametrize("name", ["rows.jsonl", "signed.jsonl?key=a", "unmeasured.jsonl"])
def test_page_is_read_as_a_file_is(url, name):
    assert read(f"{url}/{name}") == ROWS


@pytest.mark.parametrize(
    ("name", "reason"),
    [("signed.jsonl?key=b", "403"), ("broken.jsonl", "500"), ("gone.jsonl", "404|gone")],
)
def test_page_out_of_reach_is_one_line(url, name, reason):
    with pytest.raises(NoSuchRows, match=reason):
        read(f"{url}/{name}")


def test_connection_that_ends_early_is_one_line(url):
    with pytest.raises(ValueError, match=r"cut.jsonl: cannot be read \(\S+"):
        read(f"{url}/cut.jsonl")


def test_page_that_changes_is_another_data_set(url):
    """The name of kept samples goes by the content, as a URL says nothing of it."""
    config = DataConfig(train_path=f"{url}/changing.jsonl")
    assert rows_identity(config, "train") != rows_identity(config, "train")
    unchanged = DataConfig(train_path=f"{url}/rows.jsonl")
    assert rows_identity(unchanged, "train") == rows_identity(unchanged, "train")


@pytest.mark.parametrize("name", ["rows[1].jsonl", "what?.jsonl"])
def test_name_that_looks_like_a_pattern_is_a_file_where_it_is_one(tmp_path, name):
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{name}", TEXT)
    assert [file.path for file in find_files("data.train_path", f"memory://{tmp_path.name}/{name}")] == [
        f"memory:///{tmp_path.name}/{name}"
    ]
