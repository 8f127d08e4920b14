"""`lightning-peft serve`: one base and its adapters behind OpenAI's endpoints."""

import errno
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from lightning_peft.adapters.slots import Slots, cast_factors
from lightning_peft.checkpoint.lineage import check_lineage, read_lineage
from lightning_peft.checkpoint.peft_format import AdapterFileError, read_low_rank
from lightning_peft.checkpoint.peft_words import read_words
from lightning_peft.command_configs.of_answers import ServeConfig
from lightning_peft.commands.adapted import (
    base_of,
    best_of_sweep,
    check_same_model,
    inference_device,
    inference_dtype,
    layout_of,
    load_for_inference,
    say_settings_not_followed,
)
from lightning_peft.commands.serve_vllm import DEFAULT_RANK, Served, serve_by_vllm, stored_rank
from lightning_peft.inference.continuous_batching import Decoder
from lightning_peft.inference.load import adapter_folder, refuse_rewards
from lightning_peft.inference.own_settings import declared_end_ids
from lightning_peft.models.loading import load_model, load_tokenizer, model_context, model_name
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.serving.adapter_checks import NAME, other_precision
from lightning_peft.serving.engine import Engine
from lightning_peft.serving.engines import engines
from lightning_peft.serving.server_config import ServerConfig, ServingEngine
from lightning_peft.serving.tiers import AdapterTiers
from lightning_peft.serving.vllm import vllm_version
from lightning_peft.training.precision import DTYPES

logger = logging.getLogger(__name__)


def serve(config: ServeConfig) -> None:
    """Answer requests until the process is asked to leave; then requests in flight are answered first.

    vLLM takes the place of this process where it answers.
    """
    folders = named_folders(config.adapters)
    directory = None if config.adapter_dir is None else Path(config.adapter_dir)
    if directory is not None and not directory.is_dir():
        raise ValueError(f"adapter_dir={directory}: no such folder")
    found = {} if directory is None else low_rank_adapters(directory)
    first = next((str(folder) for folder in (*folders.values(), *(found if config.model is None else ()))), None)
    if first is None and config.model is None:
        raise ValueError(f"adapter_dir={directory}: has no adapter yet whose base could be taken; give model=")
    unadapted = (config.model or ModelConfig(), QuantizationConfig())
    base, quantization = base_of(first, config.model) if first else unadapted
    name = base.label or (base.name if base.path is None else Path(base.path).name)
    if name in folders:
        raise ValueError(f"adapters: {name} is the base's name; call the adapter otherwise")
    if directory is not None:
        check_no_clash(name, folders, directory)
    context = model_context(base)
    if context is not None and (config.serve.max_length or 0) > context:
        raise ValueError(f"serve.max_length={config.serve.max_length}: is above the model's context, {context}")
    served = Served(
        name, base, quantization, source_fingerprint(base), config.serve.max_length or context, first,
        tuple(found.values()),
    )  # fmt: skip
    if (version := vllm_to_take(config.serve)) is not None:
        serve_by_vllm(config, served, folders, directory, version)
    else:
        serve_embedded(config, served, folders, directory)


def vllm_to_take(config: ServerConfig) -> str | None:
    """Return the version of vLLM where it is to answer. Raises ValueError where a missing vLLM was asked for."""
    if config.engine is ServingEngine.embedded:
        return None
    if config.python is None:
        logger.info("serve.engine=auto: embedded, as serve.python names no interpreter that has vLLM")
        return None
    version, tried = vllm_version(config.python), engines()["vllm"].version
    if version is None and config.engine is ServingEngine.vllm:
        raise ValueError(f"serve.python={config.python}: has no vLLM; give an interpreter that imports it")
    if version is None:
        logger.info("serve.engine=auto: embedded, as serve.python=%s has no vLLM", config.python)
        return None
    other = "" if version == tried else f"; what it does with adapters was tried with {tried}"
    logger.info("serve.engine=%s: vLLM %s of %s%s", config.engine.name, version, config.python, other)
    return version


def serve_embedded(config: ServeConfig, served: Served, folders: dict[str, Path], directory: Path | None) -> None:
    """Answer requests in this process."""
    try:
        import uvicorn

        from lightning_peft.serving.server import build_app
        from lightning_peft.serving.state import Serving
    except ImportError as error:
        # The server is an optional extra.
        raise ValueError("serve: fastapi or uvicorn is not installed; pip install 'lightning-peft[serve]'") from error
    first = served.first
    name, base = served.name, served.base
    ranks, alone, examples = checked(folders, served)
    rank = config.serve.max_rank or max((*ranks, *served.ranks), default=DEFAULT_RANK)
    if (largest := max(ranks, default=0)) > rank:
        raise ValueError(f"serve.max_rank={rank}: the adapters named are of rank {largest}; give that, or leave it out")
    if alone is not None and (len(folders) > 1 or directory is not None):
        raise alone
    more = f" and {len(folders) - 5:,} more" if len(folders) > 5 else ""
    named = ", ".join([*folders][:5]) + more or ("none" if directory is None else f"of {directory}")
    says = (
        "it alone, as its change is no low-rank pair"
        if alone is not None
        else f"{config.serve.slots} slots of rank {rank}"
    )
    logger.info("%s with %s %s: %s", name, "adapter" if len(folders) == 1 else "adapters", named, says)
    if config.serve.dry_run:
        beside = [] if directory is None else [f"what is in {directory}"]
        print(f"{name}: would serve {', '.join([*([name] if alone is None else []), *folders, *beside])}; {says}")
        return
    listening(config.serve).close()  # a port that is taken is known before a weight is read
    tokenizer = load_tokenizer(base)
    tiers = None
    if alone is not None:
        logger.warning("%s; it is served alone, without its base", alone)
        name = next(iter(folders))
        model, tokenizer = load_for_inference(first, config.model, config.precision)
        layout = layout_of(first, tokenizer)
        slots = None
    else:
        dtype = inference_dtype(first, config.precision)
        for folder in folders.values():
            say_other_dtype(folder, dtype)
        model = load_model(base, dtype, served.quantization, device=inference_device()).eval()
        layout = layout_of(None, tokenizer, base)
        slots = Slots(model, config.serve.slots, rank, dtype)
    model.requires_grad_(False)
    layout = layout.with_stops(sorted(declared_end_ids(model)))
    say_settings_not_followed(model)
    decoder = Decoder(model, slots)
    if slots is not None:
        try_adapters(decoder, slots, examples)
        check = partial(check_later, served=served, dtype=slots.dtype)
        tiers = AdapterTiers(slots, config.serve.host_adapters, check, directory, decoder.try_slot)
        tiers.folders = folders
    if not decoder.can_batch:
        kind = type(model).__name__
        logger.warning("%s: one request is answered at a time, as its memory is more than keys and values", kind)
    engine = Engine(decoder, tiers, tokenizer, config.serve.max_batch, config.serve.max_queue)
    serving = Serving(engine, tiers, tokenizer, name, layout, served.context, config.serve)
    with listening(config.serve) as listener:
        logger.info("listens at http://%s:%d", config.serve.host, listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(build_app(serving), log_level="warning"))
        with suppress(KeyboardInterrupt):  # the server raises it again once it has drained
            server.run(sockets=[listener])
        if not server.started:
            raise SystemExit(3)


def listening(config: ServerConfig) -> socket.socket:
    """Return a socket that listens where the server is to. Raises ValueError for an address that cannot be had."""
    at = f"serve.host={config.host} serve.port={config.port}"
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "another program listens there; give another port, or serve.port=0 for any that is free"
        elif error.errno == errno.EACCES:
            remedy = "ports below 1024 are the administrator's; give another"
        else:
            is_name = isinstance(error, socket.gaierror)  # its number is none of the system's
            reason = str(error.strerror) if is_name else os.strerror(error.errno or 0)
            remedy = f"{reason.lower()}; give an address of this machine"
        raise ValueError(f"{at}: {remedy}") from error


def named_folders(adapters: Sequence[str]) -> dict[str, Path]:
    """Return the folders of `adapters=[name=path,...]`. Raises ValueError for an entry of another form."""
    found: dict[str, Path] = {}
    for entry in adapters:
        name, sign, path = entry.partition("=")
        if not sign or not NAME.fullmatch(name):
            raise ValueError(f"adapters={entry}: must be name=path, the name of letters, digits, dots and dashes")
        if name in found:
            raise ValueError(f"adapters: {name} is there twice")
        found[name] = adapter_folder(best_of_sweep(path), f"adapters: {name}")
    return found


def low_rank_adapters(directory: Path) -> dict[Path, int]:
    """Return the folders of LoRAs in a folder with their ranks; what else is there is said to who asks for it."""
    found = {}
    for path in sorted(path for path in directory.iterdir() if path.is_dir() and NAME.fullmatch(path.name)):
        try:
            folder = adapter_folder(str(path), "adapter_dir")
            if read_words(folder)["peft_type"] == "LORA":
                found[path] = stored_rank(folder)
        except (ValueError, OSError, SafetensorError):
            continue
    return found


def check_no_clash(base_name: str, folders: dict[str, Path], directory: Path) -> None:
    """Raise ValueError for a folder of `adapter_dir` that could not be asked for by its name."""
    for path in (path for path in directory.iterdir() if path.is_dir()):
        if path.name == base_name:
            raise ValueError(f"adapter_dir={directory}: has a folder {path.name}, the base's name; call it otherwise")
        named = folders.get(path.name)
        if named is not None and named.resolve() not in (path.resolve(), (path / "adapter").resolve()):
            raise ValueError(
                f"adapters: {path.name} is {named}, and a folder of adapter_dir={directory} has that name; "
                "call one of them otherwise"
            )


def say_other_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Log once that an adapter was trained in another dtype than it is served in."""
    lineage, names = read_lineage(folder), {own: str(own).removeprefix("torch.") for own in (dtype, *DTYPES.values())}
    trained = None if lineage is None else lineage.precision
    if line := other_precision(folder, trained, names[dtype], {key: names[own] for key, own in DTYPES.items()}):
        say_once(line)


@cache
def say_once(line: str) -> None:
    """Log what would be said each time that an adapter is read."""
    logger.warning("%s", line)


def check_later(folder: Path, served: Served, dtype: torch.dtype) -> None:
    """Raise ValueError for an adapter that comes while the server runs and is not the base's."""
    check_is_of_base(folder, served)
    say_other_dtype(folder, dtype)


def try_adapters(decoder: Decoder, slots: Slots, examples: Sequence[tuple[str, Path]]) -> None:
    """Raise ValueError for an adapter of layers that the model computes with by itself, or feeds no rows of a batch."""
    for name, folder in examples:
        try:
            slots.load(0, cast_factors(read_low_rank(folder), slots.dtype))
        except ValueError:  # it fits no slot, which each request to it is told
            continue
        try:
            decoder.try_slot(0)
        except ValueError as error:
            raise ValueError(f"adapters: {name}={folder}: {error}") from error
    if slots.on_host:
        slots.unload(0)


def check_is_of_base(folder: Path, served: Served, words: str | None = None) -> None:
    """Raise ValueError for an adapter of another base, or of none that writes answers; `words` name it as typed."""
    check_lineage(folder, served.fingerprint, served.quantization.kind.name, model_name(served.base))
    check_same_model(words or str(folder), folder, served.base)
    refuse_rewards(folder)


def checked(
    folders: dict[str, Path], served: Served
) -> tuple[list[int], AdapterFileError | None, list[tuple[str, Path]]]:
    """Return the ranks of the adapters, why one of them cannot share the base, and one for each set of layers.

    Raises for a wrong base.
    """
    ranks: list[int] = []
    examples: dict[frozenset[str], tuple[str, Path]] = {}
    alone: AdapterFileError | None = None
    for name, folder in folders.items():
        check_is_of_base(folder, served, f"adapters: {name}={folder}")
        try:
            change = read_low_rank(folder)
        except AdapterFileError as error:
            if "alone" not in str(error):
                raise
            alone = error
        else:
            ranks.append(max(len(part.A) for part in change.values()))
            examples.setdefault(frozenset(change), (name, folder))
    return ranks, alone, list(examples.values())
