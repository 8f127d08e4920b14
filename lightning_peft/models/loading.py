"""Any causal language model `transformers` knows: its configuration, its tokenizer and its weights."""

import inspect
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightning_peft.models.attention import accept_packed_batches, choose_attention
from lightning_peft.models.blocks import block_names
from lightning_peft.models.conversion import plan_loading
from lightning_peft.models.forwards import (
    accept_usual_arguments,
    keep_layers_in_training,
    keep_outputs,
    keep_weights_in_evaluation,
    name_outputs,
)
from lightning_peft.models.gguf_config import gguf_config
from lightning_peft.models.gguf_conversion import (
    GGUFSource,
    check_has_places,
    check_read,
    is_known,
    open_model,
)
from lightning_peft.models.gguf_vocabulary import gguf_tokenizer
from lightning_peft.models.low_bit_source import (
    LowBitSource,
    Names,
    check_named,
    format_of,
    prepare_by_config,
    prepare_low_bit_layers,
)
from lightning_peft.models.multimodal import leave_on_disk
from lightning_peft.models.new_tokens import add_embeddings, check_ends_are_dense
from lightning_peft.models.random_weights import RandomWeights
from lightning_peft.models.rope import (
    check_frequencies,
    check_scaled,
    context_length,
    scale_positions,
    set_positions_by_row,
)
from lightning_peft.models.source import (
    ModelConfig,
    files_of_weights,
    locate,
    readable_errors,
    readable_making,
    weight_files,
    weight_index,
)
from lightning_peft.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from lightning_peft.models.weight_files import (
    SafetensorsSource,
    WeightSource,
    source_of_files,
)
from lightning_peft.models.weight_streaming import parameters_on_meta, stream_weights
from lightning_peft.progress import Part
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.published.format import PublishedFormat
from lightning_peft.quantization.quantize import quantize_linears

logger = logging.getLogger(__name__)

OF_METADATA = "model of its metadata, so give the model's safetensors files"
NEED_IMAGES = {"Llama4ForConditionalGeneration"}
"""Classes that cannot run text alone: with transformers 5.24 this one reads an image's outputs off its text model."""


def model_name(config: ModelConfig) -> str:
    """Return what the base is called in an adapter's files: its path or hub id, else its name here."""
    return config.path or config.name


def model_config(config: ModelConfig) -> PreTrainedConfig:
    """Return the architecture's configuration without reading a weight. Raises ValueError without such a model."""
    if config.is_tiny:
        return tiny_config(tied=config.name == "tiny_tied")
    with readable_errors(config):
        location = locate(config)
        if location.suffix == ".gguf":
            file = open_model(location)
            if not is_known(file) and config.rope_scaling.is_on:
                raise ValueError(f"{config.rope_scaling}: not for {location.name}, which transformers reads by itself")
            with readable_making(config, OF_METADATA):
                architecture = gguf_config(file) if is_known(file) else _slow_gguf(config, location, AutoConfig)
        else:
            with readable_making(config, "model of its config.json"):
                architecture = AutoConfig.from_pretrained(location, trust_remote_code=config.trust_remote_code)
        scale_positions(architecture, config.rope_scaling)
        return architecture


def model_context(config: ModelConfig) -> int | None:
    """Return the longest sequence the model was built for, in tokens; None when its configuration does not say."""
    return context_length(model_config(config))


def model_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the number of tokens the model has embeddings for once it is loaded."""
    size = model_config(config).get_text_config().vocab_size
    return max(size, len(tokenizer)) if config.new_tokens else size


def empty_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model without weights: its parameters are on the meta device, its buffers hold values."""
    architecture = model_config(config)
    if config.new_tokens:
        text = architecture.get_text_config()
        text.vocab_size = max(text.vocab_size, len(load_tokenizer(config)))
    with readable_errors(config):
        return _build(config, architecture, dtype)


def prepare_as_published(model: PreTrainedModel, config: ModelConfig) -> PublishedFormat | None:
    """Make those layers of an empty model coded ones that its checkpoint holds in few bits; return its format.

    They are known by the names of the tensors where files or their index are at hand, else by config.json alone.
    """
    if config.is_tiny or config.random_weights or (form := format_of(model.config)) is None:
        return None
    with readable_errors(config):
        folder = locate(config)
        if keys := [*(weight_index(folder) or (SafetensorsSource(weight_files(folder)).names()))]:
            source = LowBitSource(Names(keys), form)
            plan = plan_loading(model, source.names(), set(model.state_dict()))
            prepare_low_bit_layers(model, source, plan.direct, plan.fused)
        else:
            prepare_by_config(model, form)
    if config.new_tokens:
        check_ends_are_dense(model)
    return form


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """Return the model's tokenizer, with `new_tokens` added. Raises ValueError when there is no such model."""
    if config.is_tiny:
        tokenizer = tiny_tokenizer()
    else:
        with readable_errors(config):
            tokenizer = _load_tokenizer(config, locate(config))
    tokenizer.add_tokens(config.new_tokens)
    return tokenizer


def _load_tokenizer(config: ModelConfig, location: Path) -> PreTrainedTokenizerFast:
    if location.suffix == ".gguf":
        return gguf_tokenizer(open_model(location)) or _slow_gguf(config, location, AutoTokenizer)
    with readable_making(config, "tokenizer of its files"):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=config.trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"model.path={config.path}: its tokenizer has no fast form (tokenizer.json), which is needed")
    beside = location / "chat_template.json"
    if tokenizer.chat_template is None and beside.is_file():
        # Multimodal models from before 2025 have this file, which their processor reads.
        with readable_making(config, f"chat template of its {beside.name}"):
            tokenizer.chat_template = json.loads(beside.read_text())["chat_template"]
    return tokenizer


def load_model(
    config: ModelConfig,
    dtype: torch.dtype | None,
    quantization: QuantizationConfig | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Return the model with its weights in `dtype` on `device`, in eval mode, its linear layers quantised where asked.

    Without a dtype each weight keeps the one it is stored in, to be written rather than run. Raises ValueError when
    there is no such model, or its files do not fit together.
    """
    with Part(f"loading {model_name(config)}"):
        model, blocks = load_by_block(config, dtype, quantization, device)
        for _ in blocks:
            pass
        model.to(device)  # type: ignore[arg-type]  # a wrapper of transformers hides the signature
    return model.eval()


def load_by_block(
    config: ModelConfig,
    dtype: torch.dtype | None,
    quantization: QuantizationConfig | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, Iterator[str]]:
    """Return `load_model`'s model, its transformer blocks on the meta device, and what fills them in order.

    One block is filled each time its name is asked for. A model that cannot be streamed, a tiny one or one that
    transformers reads, is on the host with all its blocks.
    """
    model, blocks = _load_parts(config, dtype, quantization, torch.device(device))
    if config.new_tokens:
        add_embeddings(model, len(load_tokenizer(replace(config, new_tokens=[]))), len(load_tokenizer(config)))
    accept_packed_batches(model)
    accept_usual_arguments(model)
    set_positions_by_row(model)
    keep_weights_in_evaluation(model)
    keep_layers_in_training(model)
    keep_outputs(model)
    return model.eval(), blocks


def check_runs(model: PreTrainedModel) -> None:
    """Raise ValueError where a number of the configuration, which transformers takes, fails in the first forward."""
    said = vars(model.config.get_text_config())  # an attribute that each layer has its own of raises when it is read
    for name, value in said.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name.endswith(("dropout", "pdrop")) and value is not None and not (is_number and 0 <= value <= 1):
            raise ValueError(f"config.json: {name}={value!r} must be a number between 0 and 1")
        is_off = value is None or (value == 0 and said.get("use_sliding_window") is False)  # Qwen2-MoE's class says 0
        if name == "sliding_window" and not is_off and not (type(value) is int and value > 0):
            raise ValueError(f"config.json: {name}={value!r} must be a number of tokens above 0, or null")
    heads, shared = (said.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    if type(heads) is int and type(shared) is int and (shared < 1 or heads % shared):
        raise ValueError(f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={shared}")


def _load_parts(
    config: ModelConfig, dtype: torch.dtype | None, quantization: QuantizationConfig | None, device: torch.device
) -> tuple[PreTrainedModel, Iterator[str]]:
    if config.is_tiny:
        model: PreTrainedModel = tiny_model(tied=config.name == "tiny_tied")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype or parameter.dtype)
        if (attention := choose_attention(model.config, config.attention)) is not None:
            model.set_attn_implementation(attention)
        if quantization is not None and quantization.is_on:
            quantize_linears(model, quantization)
        return model, iter(block_names(model))
    with readable_errors(config):
        source: WeightSource | None
        if config.random_weights:
            if (form := format_of(model_config(config))) is not None:
                logger.info("model.random_weights=true: drawn dense, not as %s", form.describe())
            model = _build(config, model_config(config), dtype or torch.float32)
            source = RandomWeights(model, device)
        else:
            location = locate(config, weights=True)
            source = _weight_source(config, location)
            if source is None:
                model = _load_gguf_by_transformers(config, location, dtype or torch.float32, quantization)
                return model, iter(block_names(model))
            architecture = model_config(config)
            if (form := format_of(architecture)) is not None:
                source = LowBitSource(source, form)
            elif getattr(architecture, "quantization_config", None) is None:
                check_named(source)
            model = _build(config, architecture, dtype or torch.float32)
            if isinstance(source, GGUFSource):
                check_has_places(source.file, model)
        parts = stream_weights(model, source, dtype, device, quantization)
        next(parts)
    return model, _readable(config, parts)


def _readable(config: ModelConfig, parts: Iterator[str]) -> Iterator[str]:
    with readable_errors(config):
        yield from parts


def _weight_source(config: ModelConfig, location: Path) -> WeightSource | None:
    """Return where the weights are read from; None for a GGUF file that cannot be streamed."""
    if location.suffix == ".gguf":
        file = open_model(location)
        return GGUFSource(file) if is_known(file) else None
    files = files_of_weights(config, location)
    if files[0].suffix == ".bin" and (form := format_of(model_config(config))) is not None:
        raise ValueError(f"model.path={config.path}: {form.describe()} is read from .safetensors files only")
    return source_of_files(files, weight_index(location))


def _build(config: ModelConfig, architecture: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    format_of(architecture)  # this refuses what cannot be read
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if (attention := choose_attention(architecture, config.attention)) is not None:
        options["attn_implementation"] = attention
    with parameters_on_meta(), readable_making(config, "model of its config.json"):
        model: PreTrainedModel = _auto_class(config, architecture).from_config(architecture, dtype=dtype, **options)
    _check_reads_text_alone(config, model)
    _check_names_embedding(config, model)
    check_scaled(model, config.rope_scaling)
    check_runs(model)
    check_frequencies(model)
    leave_on_disk(model)
    name_outputs(model)
    if not config.is_tiny and (location := locate(config)).is_dir():
        model.generation_config = _generation_config(config, location) or model.generation_config
    return model


def _generation_config(config: ModelConfig, folder: Path) -> GenerationConfig | None:
    """Return how the model's publisher generates with it; None where the folder does not say."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    with readable_making(config, "generation settings of its generation_config.json"):
        found: GenerationConfig = GenerationConfig.from_pretrained(folder)
    ends = found.eos_token_id
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        raise ValueError(f"model.path={path}: eos_token_id={ends!r} must be the number of a token, or a list of them")
    return found


def _auto_class(config: ModelConfig, architecture: PreTrainedConfig) -> Any:
    """Return transformers' class for the architecture: a causal language model, or one inside a multimodal model.

    Where both know it, the checkpoint names the one to take: Llama 4's text alone has another layout than the whole.
    Raises ValueError for one that is neither, such as an encoder-decoder.
    """
    remote = getattr(architecture, "auto_map", None) or {}
    known = [
        auto_class
        for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText)
        if type(architecture) in auto_class._model_mapping or auto_class.__name__ in remote
    ]
    wanted = {*(architecture.architectures or [])} - NEED_IMAGES
    named = [auto_class for auto_class in known if _class_name(auto_class, architecture) in wanted]
    if known:
        return (named or known)[0]
    kind = "an encoder-decoder" if architecture.is_encoder_decoder else "not a causal language model"
    raise ValueError(f"model.path={config.path}: {architecture.model_type} is {kind}; give a decoder, such as a Llama")


def _check_reads_text_alone(config: ModelConfig, model: PreTrainedModel) -> None:
    """Raise ValueError for a class that does not run without images or other inputs, such as BLIP-2's."""
    inputs = inspect.signature(type(model).forward).parameters.values()
    needed = [i.name for i in inputs if i.default is i.empty and i.kind not in (i.VAR_POSITIONAL, i.VAR_KEYWORD)]
    if others := [name for name in needed if name not in ("self", "input_ids")]:
        raise ValueError(
            f"model.path={config.path}: {type(model).__name__} does not run without {' and '.join(others)}, and text "
            "alone is trained here; give a folder of its language model, as transformers' save_pretrained writes it"
        )


def _check_names_embedding(config: ModelConfig, model: PreTrainedModel) -> None:
    """Raise ValueError for a class, such as one of remote code, that does not say which is its input embedding."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        found = None
    if found is None:
        raise ValueError(
            f"model.path={config.path}: {type(model).__name__} does not say which part is its input embedding; write "
            "get_input_embeddings, and get_output_embeddings for the head, into its modeling file"
        )


def _class_name(auto_class: Any, architecture: PreTrainedConfig) -> str:
    found = auto_class._model_mapping.get(type(architecture), None)
    return getattr(found, "__name__", "")


def _load_gguf_by_transformers(
    config: ModelConfig, location: Path, dtype: torch.dtype, quantization: QuantizationConfig | None
) -> PreTrainedModel:
    """Load a GGUF file of a family that is not streamed."""
    logger.info("%s is read by transformers, slower and with more memory: its family is not streamed", location.name)
    architecture = model_config(config)
    with parameters_on_meta(), readable_making(config, OF_METADATA):
        empty: PreTrainedModel = _auto_class(config, architecture).from_config(architecture, dtype=dtype)
    check_read(open_model(location), empty)
    model: PreTrainedModel = _slow_gguf(config, location, AutoModelForCausalLM, dtype=dtype)
    if (attention := choose_attention(model.config, config.attention)) is not None:
        model.set_attn_implementation(attention)
    if quantization is not None and quantization.is_on:
        quantize_linears(model, quantization)
    return model


def _slow_gguf(config: ModelConfig, location: Path, auto_class: Any, **options: Any) -> Any:
    return auto_class.from_pretrained(
        location.parent, gguf_file=location.name, trust_remote_code=config.trust_remote_code, **options
    )
