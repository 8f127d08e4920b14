"""Options of the server."""

from dataclasses import dataclass
from enum import Enum

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServingEngine(Enum):
    """The programs that compute the answers."""

    auto = "auto"
    vllm = "vllm"
    embedded = "embedded"


@dataclass
class ServerConfig:
    """The server's address, and how much it takes on."""

    engine: ServingEngine = ServingEngine.auto
    """embedded: this process; vllm: vLLM, started with serve.python; auto: vllm where serve.python has it."""
    python: str | None = None
    """Python interpreter that has vLLM, as /opt/vllm/bin/python."""
    host: str = "127.0.0.1"
    """Address to listen at; another than this machine's own needs serve.api_key."""
    port: int = 8000
    """Port to listen at; 0 takes one that is free, which the log names."""
    api_key: str | None = None
    """Key that clients must send as their API key; null asks for none."""
    max_batch: int = 16
    """Requests answered side by side."""
    max_queue: int = 64
    """Requests that may wait beside those; more get status 429."""
    slots: int = 8
    """Adapters beside the model at once; a bound of a batch on a GPU, not on a CPU."""
    max_rank: int | None = None
    """Rank of a slot; null takes the largest of the adapters named and in adapter_dir, 16 without any."""
    host_adapters: int = 64
    """Adapters kept in the host's memory; others are read from disk when they are asked for."""
    max_length: int | None = None
    """Longest prompt and answer in tokens; null takes the model's context."""
    allow_load: bool = False
    """Open the endpoints that load and unload adapters, from folders below adapter_dir."""
    dry_run: bool = False
    """Say what would be served, then stop."""

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("serve.api_key='': is empty, so that everybody would know it; give a key, or leave it out")
        if self.host not in LOOPBACK and self.api_key is None:
            raise ValueError(f"serve.host={self.host}: others could use it; give serve.api_key, or leave 127.0.0.1")
        if not 0 <= self.port < 65536:
            raise ValueError(f"serve.port={self.port}: must be from 0 to 65535")
        for name in ("max_batch", "max_queue", "slots", "host_adapters"):
            if getattr(self, name) < 1:
                raise ValueError(f"serve.{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_rank", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"serve.{name}={getattr(self, name)}: must be at least 1, or null")
        if self.engine is ServingEngine.vllm and self.python is None:
            raise ValueError("serve.engine=vllm serve.python=null: give serve.python=, an interpreter that has vLLM")
        if self.engine is ServingEngine.embedded and self.python is not None:
            raise ValueError(
                f"serve.engine=embedded serve.python={self.python}: nothing would read it; leave it out, or use "
                "serve.engine=vllm"
            )
