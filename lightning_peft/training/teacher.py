"""The frozen model that `objective=distill` learns from: another model, or the base itself, with an adapter or without.

A teacher on the base is a second tree of modules around the same tensors, so that it takes no memory but its adapter's.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.checkpoint.lineage import check_lineage, read_lineage
from lightning_peft.checkpoint.peft_format import (
    CONFIG_NAME,
    adapter_config_from_peft,
    adapter_sha256,
    changes_base,
    load_adapter,
)
from lightning_peft.data.config import DataConfig
from lightning_peft.inference.load import MODEL_FOLDER, adapter_folder, load_adapted, refuse_rewards
from lightning_peft.models.loading import empty_model, load_model, load_tokenizer, model_context, model_name
from lightning_peft.models.packing_choice import packing_of
from lightning_peft.models.source import MODELS, ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.objectives.objective import ObjectiveConfig
from lightning_peft.objectives.teacher import TaughtConfig, TaughtLoss, Teacher
from lightning_peft.quantization.config import QuantizationConfig

logger = logging.getLogger(__name__)


def teacher_model(objective: TaughtConfig) -> ModelConfig | None:
    """Return the model that `objective.teacher` names, None where it is the base. Raises ValueError for others."""
    name = objective.teacher
    if name is None:
        return None
    holds_model = (Path(name) / "config.json").is_file()
    if not holds_model and (whole := Path(name) / MODEL_FOLDER / "config.json").is_file():
        raise ValueError(f"objective.teacher={name}: a run; its model is objective.teacher={whole.parent}")
    if not holds_model and any((folder / CONFIG_NAME).is_file() for folder in (Path(name), Path(name) / "adapter")):
        raise ValueError(f"objective.teacher={name}: holds an adapter; give it as objective.teacher_adapter={name}")
    return ModelConfig(name=name) if name in MODELS and name != "hf" else ModelConfig(name="hf", path=name)


def teacher_context(objective: ObjectiveConfig, model: ModelConfig) -> int | None:
    """Return the longest sequence the teacher was built for, which is `model` where none is named; None as there."""
    named = teacher_model(objective) if isinstance(objective, TaughtConfig) else None
    if named is None:
        return model_context(model)
    with named_as_teacher():
        return model_context(named)


def teacher_folder(objective: TaughtConfig) -> Path | None:
    """Return the adapter folder that the teacher has, None where it has none. Raises ValueError for another path."""
    if objective.teacher_adapter is None:
        return None
    return adapter_folder(objective.teacher_adapter, "objective.teacher_adapter")


def shares_base(objective: TaughtConfig) -> bool:
    """Return whether the teacher stands on the tensors of the base that is trained on."""
    folder = teacher_folder(objective)
    return objective.teacher is None and (folder is None or not changes_base(folder))


@contextmanager
def named_as_teacher() -> Iterator[None]:
    """Say of `objective.teacher`, inside the block, what is wrong with a model."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("model.path=", "objective.teacher=", 1)) from error


def check_teacher(
    objective: TaughtConfig,
    model: ModelConfig,
    quantization: QuantizationConfig,
    tokenizer: PreTrainedTokenizerFast,
    longest: int,
) -> None:
    """Raise ValueError for a teacher that is not there, has other tokens, or reads fewer of them than a sample has.

    Weights are read to fingerprint them alone. `model`, `quantization` and `tokenizer` are those that train, `longest`
    is `data.max_length`.
    """
    named = teacher_model(objective)
    if named is not None:
        with named_as_teacher():
            context, theirs = model_context(named), load_tokenizer(named)
        if context is not None and longest > context:
            raise ValueError(
                f"objective.teacher={objective.teacher}: reads up to {context} tokens, and data.max_length={longest}; "
                f"give a teacher of a longer context, or data.max_length={context}"
            )
        check_same_tokens(str(objective.teacher), theirs, tokenizer)
    if (folder := teacher_folder(objective)) is not None:
        refuse_rewards(folder)
        base = named or model
        kind = quantization.kind.name if named is None or objective.quantize_teacher else "none"
        check_lineage(folder, source_fingerprint(base), kind, model_name(base))
        if named is None:
            check_same_new_tokens(folder, model)


def check_same_new_tokens(folder: Path, model: ModelConfig) -> None:
    """Raise ValueError where tokens that an adapter brings are others than those that the run adds."""
    lineage = read_lineage(folder)
    theirs = [] if lineage is None else list(lineage.config.get("model", {}).get("new_tokens", []))
    both = min(len(theirs), len(model.new_tokens))
    if theirs[:both] != list(model.new_tokens[:both]):
        raise ValueError(
            f"objective.teacher_adapter={folder}: was trained with model.new_tokens={theirs}, and here they are "
            f"{list(model.new_tokens)}: the same ids would stand for other texts"
        )


def teacher_packs(objective: TaughtConfig, data: DataConfig) -> bool:
    """Return whether a named teacher keeps packed samples apart too. Raises ValueError where data.packing=true."""
    if (named := teacher_model(objective)) is None:
        return True
    with named_as_teacher():
        teacher = empty_model(named)
    return packing_of(data, teacher)


def check_same_tokens(name: str, theirs: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast) -> None:
    """Raise ValueError where a token id stands for another text in the teacher `name`, or for none."""
    there, here = theirs.get_vocab(), ours.get_vocab()
    if there == here:
        return
    by_id = {number: token for token, number in here.items()}
    token, number = min(there.items() - here.items(), key=lambda entry: entry[1], default=("", -1))
    if number < 0:
        token, number = min(here.items() - there.items(), key=lambda entry: entry[1])
        found = f"token {number}, {token!r} here, is not in it"
    else:
        own = f"{by_id[number]!r}" if number in by_id else "no token"
        found = f"its token {number} is {token!r}, here {own}"
    raise ValueError(
        f"objective.teacher={name}: {found} ({len(there):,} and {len(here):,} tokens): distributions are compared "
        "token by token; give a teacher with the vocabulary of the model"
    )


def content_of_teacher(objective: TaughtConfig) -> dict[str, str]:
    """Return name and fingerprint of what the teacher is beside the base."""
    content = {}
    if (named := teacher_model(objective)) is not None:
        content["teacher weights"] = source_fingerprint(named)
    if (folder := teacher_folder(objective)) is not None:
        content["files of the teacher's adapter"] = adapter_sha256(folder)
    return content


def give_teacher(
    objective: TaughtLoss,
    twin: PreTrainedModel | None,
    model: ModelConfig,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Load the teacher that the options name; `model`, `quantization`, `dtype` and `device` are those that train.

    `twin` is the base once more, around the same tensors, for a teacher that shares it.
    """
    config, student = objective.config, objective.model
    teacher = twin
    if teacher is None:
        teacher = _load(config, model, quantization, dtype, device)
    else:
        keep_from_training(teacher, student)
        give_adapter(teacher, config)
    objective.teacher = Teacher(teacher.eval(), objective.packing)
    own, of_student = ({t.data_ptr(): t.nbytes for t in tensors_of(part)} for part in (teacher, student))
    beside = sum(size for place, size in own.items() if place not in of_student)
    sizes = [module.config.get_text_config().vocab_size for module in (teacher, student)]
    logger.info("memory: teacher %.1f MiB beside the base", beside / 2**20)
    if sizes[0] != sizes[1]:
        logger.info("heads of %d (teacher) and %d tokens: compared over the first %d", *sizes, min(sizes))


def teacher_alone(
    objective: TaughtConfig,
    model: ModelConfig,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """Return the teacher with a base of its own, in eval mode, for a process that holds no model yet."""
    if not shares_base(objective):
        return _load(objective, model, quantization, dtype, device).eval()
    teacher = load_model(model, dtype, quantization, device)
    give_adapter(teacher, objective)
    return teacher.eval().requires_grad_(False)


def give_adapter(teacher: PreTrainedModel, objective: TaughtConfig) -> None:
    """Put the teacher's adapter onto the base, where it has one."""
    if (folder := teacher_folder(objective)) is not None:
        inject_adapters(teacher, adapter_config_from_peft(folder))
        load_adapter(teacher, folder)


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _load(
    objective: TaughtConfig,
    model: ModelConfig,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """Return a teacher with weights of its own, in eval mode."""
    named, folder = teacher_model(objective), teacher_folder(objective)
    if named is not None and not objective.quantize_teacher:
        quantization = QuantizationConfig()
    if folder is None:
        assert named is not None, "a teacher without a name or an adapter is the base"
        return load_model(named, dtype, quantization, device)
    if named is None:
        logger.info("objective.teacher_adapter=%s: trains more than adapters: it has a base of its own", folder)
        if (lineage := read_lineage(folder)) is not None:  # tokens that it brings are rows of its embeddings
            model = replace(model, new_tokens=lineage.config.get("model", {}).get("new_tokens", model.new_tokens))
    return load_adapted(folder, named or model, quantization, dtype, device)


@torch.no_grad()
def keep_from_training(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Give the teacher tensors of its own for those that train: of a module beside the adapters, or the whole base."""
    trained = {parameter.data_ptr() for parameter in student.parameters() if parameter.requires_grad}
    for parameter in teacher.parameters():
        if parameter.data_ptr() in trained:
            parameter.data = parameter.data.clone()
