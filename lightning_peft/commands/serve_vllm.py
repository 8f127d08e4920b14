"""`serve.engine=vllm`: adapters are judged and made plain, then vLLM takes this process's place."""

import hashlib
import logging
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from lightning_peft.adapters.base import NotMergeableError
from lightning_peft.checkpoint.atomic import atomic_folder
from lightning_peft.checkpoint.lineage import check_lineage
from lightning_peft.checkpoint.peft_format import WEIGHTS_NAME, adapter_config_from_peft
from lightning_peft.checkpoint.peft_methods import KEEPS_BASE, REWRITES_BASE, SWITCHED_OFF
from lightning_peft.command_configs.of_adapters import ExportConfig, ExportFormat
from lightning_peft.command_configs.of_answers import ServeConfig
from lightning_peft.commands.adapted import (
    check_has_room,
    check_same_model,
    features_of_folder,
    inference_dtype,
    layout_of,
    say_settings_not_followed,
)
from lightning_peft.commands.export import base_file, export
from lightning_peft.inference.load import refuse_rewards
from lightning_peft.inference.own_settings import declared_end_ids
from lightning_peft.models.loading import empty_model, load_model, load_tokenizer, model_name
from lightning_peft.models.source import ModelConfig, commit_of, name_for_others
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.runs.lock import only_writer
from lightning_peft.serving.adapter_checks import Settings, check_adapter, check_name, read_layout, remarks
from lightning_peft.serving.engines import Outcome, engines, largest_rank, not_low_rank, verdict
from lightning_peft.serving.server_config import ServerConfig
from lightning_peft.serving.vllm import (
    HAND_OVER,
    VllmServer,
    layers_of,
    size_for,
    spoken_variables,
    takes_patterns,
)
from lightning_peft.training.precision import DTYPES
from lightning_peft.user_cache import user_cache

logger = logging.getLogger(__name__)

DEFAULT_RANK = 16
SECONDS_FOR_ANOTHER_START = 3600.0
"""Time that a start waits for one that writes the same base or adapters: more than the largest base takes."""


@dataclass(frozen=True)
class Served:
    """The base as `serve` has found it."""

    name: str
    base: ModelConfig
    quantization: QuantizationConfig
    fingerprint: str
    context: int | None
    """Longest prompt and answer in tokens; None where nobody says."""
    first: str | None
    """An adapter whose training says how the base is computed; None where it is served as this machine does best."""
    ranks: tuple[int, ...]
    """Ranks of the adapters in `adapter_dir` when the server starts."""


@dataclass(frozen=True)
class JudgedAdapter:
    """An adapter, and the way vLLM serves it."""

    folder: Path
    rank: int
    becomes_plain: bool
    """True where vLLM computes the adapter rightly once it is exported."""
    text: str
    refused: bool = False


def serve_by_vllm(
    config: ServeConfig, served: Served, folders: dict[str, Path], directory: Path | None, version: str
) -> None:
    """Become vLLM with the base and its adapters. Raises ValueError for what vLLM would refuse or compute wrongly."""
    check_options(config.serve, served.base)
    reads_patterns = takes_patterns(version)
    judged = {name: judge(name, folder, served, reads_patterns) for name, folder in folders.items()}
    for name, adapter in judged.items():
        print(f"{name}: {adapter.text}")
    for name, adapter in judged.items():
        if adapter.refused:
            raise ValueError(f"adapters: {name}={adapter.folder}: {adapter.text}")
    dtype = inference_dtype(served.first, config.precision)
    in_directory = [rank for rank in served.ranks if rank <= engines()["vllm"].rank_sizes[-1]]
    ranks = [*in_directory, *(adapter.rank for adapter in judged.values())]
    rank = config.serve.max_rank or max(ranks, default=DEFAULT_RANK)
    model = empty_model(served.base)
    say_settings_not_followed(model)
    layout = layout_of(None, load_tokenizer(served.base), served.base).with_stops(sorted(declared_end_ids(model)))
    kinds = {each: str(each).removeprefix("torch.") for each in (dtype, *DTYPES.values())}
    settings = Settings(
        served.name, served.fingerprint, layers_of(model), size_for(rank), asdict(layout),
        {name: str(adapter.folder.resolve()) for name, adapter in judged.items()},
        None if directory is None else str(directory.resolve()), config.serve.allow_load,
        config.serve.max_batch + config.serve.max_queue, reads_patterns, kinds[dtype],
        {precision: kinds[own] for precision, own in DTYPES.items()}, [*KEEPS_BASE], [*REWRITES_BASE],
        {word: [*off] for word, off in SWITCHED_OFF.items()},
    )  # fmt: skip
    for adapter in judged.values():
        if not adapter.becomes_plain:
            check_adapter(adapter.folder, settings)
            check_finite_factors(adapter.folder, dtype)
        read_layout(adapter.folder)  # the middleware reads it once vLLM has loaded the base
        for line in remarks(adapter.folder, settings):
            logger.warning("%s", line)
    base = base_for_vllm(served, dtype)
    plain = {name: plain_folder(adapter.folder) for name, adapter in judged.items() if adapter.becomes_plain}
    settings = replace(settings, adapters=settings.adapters | {name: str(path) for name, path in plain.items()})
    assert config.serve.python is not None
    commit = commit_of(served.base) if base == served.base.path else None
    server = VllmServer(
        config.serve.python, base, commit, served.base.trust_remote_code, served.base.allow_pickle,
        dtype, settings, config.serve,
    )  # fmt: skip
    words = [f"{key}={value}" for key, value in spoken_variables(server.variables()).items()]
    command = shlex.join(["env", *words, *server.command()])
    if config.serve.dry_run:
        print(command)
        return
    with only_writer(user_cache() / HAND_OVER, "serve.engine", SECONDS_FOR_ANOTHER_START):
        write_base(served.base, dtype, base)
        for name, path in plain.items():
            if not path.is_dir():
                adapter_path = str(judged[name].folder)
                export(
                    ExportConfig(
                        adapter_path=adapter_path, output=str(path), format=ExportFormat.plain, base_name=base,
                        model=config.model, precision=config.precision,
                    )
                )  # fmt: skip
            check_adapter(path, settings)
        server.write_hand_over()
    logger.info("%s", command)
    server.become()


def check_options(config: ServerConfig, base: ModelConfig) -> None:
    """Raise ValueError for options that vLLM cannot honour."""
    instead = "use serve.engine=embedded"
    if config.host_adapters < config.slots:
        raise ValueError(
            f"serve.host_adapters={config.host_adapters} serve.slots={config.slots}: vLLM keeps on the host what is in "
            "slots; give as many host_adapters at least"
        )
    if base.attention != "auto":
        raise ValueError(f"model.attention={base.attention}: vLLM has kernels of its own; leave it out, or {instead}")
    if base.new_tokens:
        raise ValueError(f"model.new_tokens={base.new_tokens}: vLLM's base has no rows for them; {instead}")
    if base.rope_scaling.is_on:
        raise ValueError(f"{base.rope_scaling}: vLLM takes positions from the base's config.json; {instead}")
    if base.random_weights:
        raise ValueError(f"model.random_weights=true: vLLM reads weights from files; {instead}")


def judge(name: str, folder: Path, served: Served, reads_patterns: bool) -> JudgedAdapter:
    """Return what vLLM does with an adapter. Raises ValueError for a wrong base, a reward model, a name."""
    try:
        check_name(name, served.name)
    except ValueError as error:
        raise ValueError(f"adapters: {error}") from error
    check_lineage(folder, served.fingerprint, served.quantization.kind.name, model_name(served.base))
    check_same_model(f"adapters: {name}={folder}", folder, served.base)
    refuse_rewards(folder)
    engine, features = engines()["vllm"], features_of_folder(folder)
    rank = max(stored_rank(folder), largest_rank(adapter_config_from_peft(folder)))
    own = verdict(engine, features, rank, None)
    has_patterns = not {"rank_pattern", "alpha_pattern"}.isdisjoint(features)
    if own.outcome is Outcome.ok and (reads_patterns or not has_patterns):
        return JudgedAdapter(folder, rank, False, f"{engine.title} {own.text}")
    blocking = not_low_rank(features)
    exported = verdict(engine, features, rank, ExportFormat.plain.value)
    if blocking is not None or exported.outcome is not Outcome.ok:
        remedy = "serve.engine=embedded serves it alone"
        try:
            check_has_room(folder, served.base)
            remedy += ", `lightning-peft merge` makes a model of it and its base"
        except NotMergeableError:
            pass  # that model would have no place for a part of it
        said = own if blocking is not None else exported
        return JudgedAdapter(folder, rank, False, f"{engine.title} {said.text}; {remedy}", refused=True)
    return JudgedAdapter(folder, rank, True, f"{engine.title} {exported.text}, after `export format=plain`")


def stored_rank(folder: Path) -> int:
    """Return the largest rank of a layer in an adapter's file, or of its config where the file has other factors."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        ranks = [file.get_slice(key).get_shape()[0] for key in file.keys() if ".lora_A" in key or "embedding_A" in key]
    return max(ranks) if ranks else largest_rank(adapter_config_from_peft(folder))


def check_finite_factors(folder: Path, dtype: torch.dtype) -> None:
    """Raise ValueError for an adapter with numbers that are not finite in the dtype it is served in."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        if not all(bool(file.get_tensor(key).to(dtype).isfinite().all()) for key in file.keys()):
            raise ValueError(f"{folder}: has numbers that are not finite, in {dtype}; it has no answers")


def base_for_vllm(served: Served, dtype: torch.dtype) -> str:
    """Return the base as vLLM takes it: its hub id or folder, or the folder that `write_base` makes of another."""
    if served.base.path is not None and base_file(served.base) is None:
        return str(name_for_others(served.base))
    kind = str(dtype).removeprefix("torch.")
    return str(user_cache() / HAND_OVER / "bases" / f"{served.name}-{served.fingerprint[:16]}-{kind}")


def write_base(base: ModelConfig, dtype: torch.dtype, path: str) -> None:
    """Write a base that is no folder of transformers' as one, once."""
    if (base.path is not None and base_file(base) is None) or Path(path).is_dir():
        return
    logger.info("%s: the base as vLLM reads it, written once", path)
    with atomic_folder(Path(path)) as partial:
        load_model(base, dtype).save_pretrained(partial)
        load_tokenizer(base).save_pretrained(partial)


def plain_folder(folder: Path) -> Path:
    """Return where the plain form of an adapter lies: another place for each content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return user_cache() / HAND_OVER / "adapters" / digest.hexdigest()[:16]
