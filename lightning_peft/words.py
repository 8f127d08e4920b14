"""Everyday words of the command line: a YAML file of one's own, rank=16, model=org/name, data=rows.csv.

Names that other tools use are answered with ours.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import OverrideParseException

from lightning_peft.data.config import named_sources
from lightning_peft.schemas import CONF_DIR

logger = logging.getLogger(__name__)

ROW_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".xlsx", ".arrow", ".gz", ".zst")
"""Endings by which data=FILE is told from the name of an option."""
OWN_FOLDER = "conf_dir"
"""The word for a folder of one's own options, as conf_dir=conf with conf/model/mine.yaml for model=mine."""
SOURCES_KEY = "data.sources"
"""The key of a mixture, which may be a list too."""
RUN_COMMANDS = ("train", "submit", "estimate", "data")
"""Commands whose words describe a training."""

OURS = {
    "optimizer.lr": "lr learning_rate learningrate",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.lora_plus_ratio": "loraplus_lr_ratio lora_plus_ratio",
    "optimizer": "optim optimiser",
    "schedule": "lr_scheduler lr_scheduler_type scheduler",
    "schedule.warmup_steps": "warmup_steps warmup",
    "schedule.warmup_fraction": "warmup_ratio warmup_fraction",
    "trainer.max_epochs": "epochs num_epochs num_train_epochs max_epochs n_epochs",
    "trainer.max_steps": "max_steps steps num_steps train_steps",
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps grad_accum gradient_accumulation",
    "trainer.gradient_clip_val": "max_grad_norm gradient_clipping grad_clip",
    "trainer.devices": "devices gpus num_gpus n_gpus nproc_per_node",
    "trainer.num_nodes": "nodes num_nodes nnodes",
    "trainer.precision": "precision bf16 fp16 tf32 dtype torch_dtype",
    "trainer.log_every_n_steps": "logging_steps log_every",
    "trainer.max_time": "max_time time_limit",
    "data.micro_batch_size": "batch_size micro_batch_size per_device_train_batch_size train_batch_size bs",
    "data.max_length": "max_length max_seq_length max_seq_len sequence_len cutoff_len seq_len context_length",
    "data.packing": "packing sample_packing pack",
    "data.validation_fraction": "val_set_size val_size validation_fraction test_size eval_split_ratio",
    "data.max_rows": "max_samples max_rows max_train_samples",
    "data=FILE": "dataset datasets dataset_path dataset_name train_file train_data train_path training_file",
    "data.validation_path": "validation_file validation_path eval_file eval_dataset val_file test_file",
    "data.system_prompt": "system_prompt system",
    "data.num_workers": "num_workers dataloader_num_workers",
    "objective": "rl rlhf loss_type training_type stage",
    "objective.label_smoothing": "label_smoothing cdpo_label_smoothing dpo_label_smoothing",
    "objective.beta": "beta dpo_beta pref_beta rl_beta",
    "objective.gamma": "simpo_gamma",
    "objective.centering": "center_rewards_coefficient",
    "objective.teacher": "teacher teacher_model teacher_model_name_or_path",
    "objective.weight": "kd_alpha",
    "objective.temperature": "kd_temperature",
    "data.train_on_last_turn": "train_on_last_turn",
    "data.task": "task metric",
    "adapter.alpha": "alpha lora_alpha",
    "adapter.dropout": "dropout lora_dropout",
    "adapter.init": "init init_lora_weights",
    "adapter.layers": "layers layers_to_transform",
    "adapter.exclude_modules": "exclude_modules",
    "adapter.trainable_modules": "modules_to_save trainable_modules",
    "adapter.init_from": "init_from lora_model_dir",
    "adapter.rank_stabilized": "use_rslora rslora rank_stabilized",
    "target_modules": "lora_target_modules lora_target targets target lora_target_linear",
    "rank": "r lora_r lora_rank",
    "method=qlora": "load_in_4bit nf4 quantization_bit bits",
    "quantization=int8": "load_in_8bit int8",
    "method": "peft_type finetuning_type adapter_type peft_method",
    "model": "model_name_or_path base_model model_name base_model_name model_id pretrained_model_name_or_path",
    "model.path": "model_path path",
    "model.trust_remote_code": "trust_remote_code",
    "model.attention": "attn_implementation flash_attention attention use_flash_attention",
    "run_dir": "output_dir out_dir out output save_dir output_path logging_dir",
    "resume=auto": "resume_from_checkpoint auto_resume_from_checkpoints",
    "checkpoint.every_n_steps": "save_steps save_every saves_per_epoch save_interval",
    "checkpoint.keep_last": "save_total_limit",
    "validation.every_n_steps": "eval_steps eval_every evals_per_epoch val_check_interval eval_interval",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing",
    "logger": "report_to wandb tracker log_with",
    "logger.wandb.project": "wandb_project project",
    "logger.wandb.name": "wandb_name run_name wandb_run_id",
    "strategy": "distributed deepspeed fsdp ddp parallel accelerator_strategy",
    "compile": "torch_compile",
    "sweep_dir": "sweep_path",
    "cluster.partition": "partition",
    "cluster.time": "time walltime",
}
"""Our word -> what HF's Trainer and PEFT, axolotl, LLaMA-Factory, torchtune and litgpt call it."""
BY_THEIRS = {theirs: ours for ours, names in OURS.items() for theirs in names.split()}


FIRST_WORD = {
    **dict.fromkeys(
        ("evaluate", "calibrate", "inspect", "convert", "generate", "merge", "export", "push"), "adapter_path"
    ),
    "report": "path",
}
"""The key of what a command works on, for which its bare word stands."""


def everyday(command: str, words: list[str]) -> list[str]:
    """Rewrite the everyday words of a command into the keys and groups that Hydra knows.

    Raises ValueError for a word of another tool, or in another tool's form, with ours beside it.
    """
    written: list[str] = []
    bare: list[str] = []
    for word in words:
        if word.startswith("-"):
            raise ValueError(f"{word}: {_without_dashes(word)}")
        file = word.removeprefix("recipe=")
        if "=" not in file and file.endswith((".yaml", ".yml")) and command in RUN_COMMANDS:
            written += words_of_file(Path(file))
        elif command in FIRST_WORD and re.fullmatch(r"[^=+~]+", word):
            bare.append(word)
        else:
            written.append(word)
    written += _of_bare_words(command, bare)
    folders = [word.partition("=")[2] for word in written if word.startswith(f"{OWN_FOLDER}=")]
    if command in (*RUN_COMMANDS, "serve", *FIRST_WORD.keys() - {"push", "report"}):
        own = [Path(folder) for folder in folders]
        written = [part for word in written for part in _rewritten(word, (CONF_DIR, *own), command)]
    if folders:
        written = [word for word in written if not word.startswith(f"{OWN_FOLDER}=")]
        written = [_search_path(folders, written), *written]
    if command in RUN_COMMANDS:
        written = [word for word in _with_data_option(written) if word != "run_dir=null"]  # that is to leave it out
        written = [*_of_warm_start(written), *written]
    return written


class EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key that a mapping has twice is an error: yaml keeps the last and drops the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def _search_path(folders: list[str], words: list[str]) -> str:
    """Return Hydra's word for folders with options of one's own. Raises ValueError where one is no folder."""
    if given := next((word for word in words if word.startswith("hydra.searchpath=")), None):
        raise ValueError(f"{OWN_FOLDER}={folders[0]} and {given}: give all folders by one of them")
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{OWN_FOLDER}={folder}: no such folder; it holds GROUP/NAME.yaml, as model/mine.yaml")
    return f"hydra.searchpath=[{','.join(_value(f'file://{Path(folder).resolve()}') for folder in folders)}]"


def words_of_file(path: Path) -> list[str]:
    """Return the words that a YAML file of groups and keys stands for, outer groups before the keys inside them.

    A recipe's list of defaults is read as groups.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), EachKeyOnce)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; `lightning-peft init {path}` writes one to start from") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: must hold keys and values, as in `method: qlora`")
    if content.keys() >= {"adapter", "optimizer", "trainer", "run_dir"}:
        raise ValueError(f"{path}: is the whole config of a run; config_path={path} starts from it")
    groups = _groups_of_recipe(content.pop("defaults", []), path)
    words = list(_flat(groups | content, "", path))
    return [word for word in words if "." not in word.partition("=")[0]] + [
        word for word in words if "." in word.partition("=")[0]
    ]


def _groups_of_recipe(defaults: Any, path: Path) -> dict[str, Any]:
    """Return group -> option of a list such as [{override /method: qlora}]."""
    groups: dict[str, Any] = {}
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if entry == "_self_":
            continue
        named = list(entry.items()) if isinstance(entry, dict) else []
        if len(named) != 1 or not (group := re.fullmatch(r"(?:override )?/?([\w/]+)", str(named[0][0]))):
            raise ValueError(f"{path}: defaults: {entry!r} must be of the form `override /group: option`")
        groups[group.group(1)] = named[0][1]
    return groups


def _flat(content: dict[Any, Any], prefix: str, path: Path) -> Iterator[str]:
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: {prefix}{key}: a key must be text")
        if f"{prefix}{key}" == SOURCES_KEY and isinstance(value, list):
            value = named_sources(value)
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.", path)
        else:
            yield f"{prefix}{key}={_value(value)}"


def _value(value: Any) -> str:
    """A YAML value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_value(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./${}:-]+", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)


def _of_bare_words(command: str, words: list[str]) -> list[str]:
    """Return what a command works on, by its key. Raises ValueError for more of them than the command takes."""
    if not words:
        return []
    key = FIRST_WORD[command]
    if command == "convert" and len(words) > 1:
        return [f"{key}=[{','.join(words)}]"]
    if command == "inspect" and len(words) == 2:
        return [f"{key}={words[0]}", f"other_path={words[1]}"]
    if len(words) > 1:
        raise ValueError(f"{' '.join(words)}: {command} takes one of them; its options are key=value")
    return [f"{key}={words[0]}"]


def _rewritten(word: str, folders: Sequence[Path], command: str) -> list[str]:
    key, sign, value = word.partition("=")
    if not sign:
        return [word]
    if key == "adapters" and value.startswith("[") and value.endswith("]"):
        entries = [entry.strip().strip("'\"") for entry in value[1:-1].split(",")]
        return ["adapters=[" + ",".join(f"'{entry}'" for entry in entries if entry) + "]"]
    if key == SOURCES_KEY and value.startswith("["):
        return _words_of_list(word)
    if command == "convert" and key in ("rank", "method"):  # which Hydra knows as groups
        return [f"{'svd_rank' if key == 'rank' else 'to'}={value}"]
    if key == "rank" and command in RUN_COMMANDS and re.fullmatch(r"\d+(,\d+)*", value):
        return [f"adapter.rank={value}"]
    if key == "target_modules" and value.replace("-", "_") == "all_linear":
        return ["target_modules=all_linear"]
    if key == "target_modules" and value.startswith("["):
        return [f"adapter.target_modules={value}"]
    if key == "target_modules" and all(_no_option("target_modules", name, folders) for name in value.split(",")):
        return [f"adapter.target_modules=[{value}]"]
    if key == "model" and "," not in value and _no_option("model", value, folders) and _is_model(value):
        return ["model=hf", f"model.path={value}"]
    if key == "objective.teacher":
        return [f"{key}={_of_preset(value, folders)}"]
    if key == "data" and "," not in value and _no_option("data", value, folders) and _is_rows(value):
        return ["data=jsonl", f"data.train_path={value}"]
    return [word]


def _words_of_list(word: str) -> list[str]:
    """The words that data.sources=[{...},{...}] stands for, each entry by its name."""
    from hydra.core.override_parser.overrides_parser import (
        OverridesParser,
    )  # slow to import

    try:
        entries = OverridesParser.create().parse_override(word).value()
    except OverrideParseException as error:
        raise ValueError(f"{word}: not of the form {SOURCES_KEY}=[{{train_path: FILE}},...]") from error
    assert isinstance(entries, list)
    return list(_flat({"data": {"sources": named_sources(entries)}}, "", Path()))


def _no_option(group: str, name: str, folders: Sequence[Path]) -> bool:
    return not any((folder / group / f"{name}.yaml").is_file() for folder in folders)


def _of_preset(name: str, folders: Sequence[Path]) -> str:
    """Return the path that the model option file of this name holds, and the name where there is no such file."""
    files = [folder / "model" / f"{name}.yaml" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    path = yaml.safe_load(found.read_text(encoding="utf-8")).get("path") if found is not None else None
    return str(path or name)


def _is_model(value: str) -> bool:
    text = value.strip("'\"")
    return "/" in text or text.endswith(".gguf") or Path(text).is_dir()


def _is_rows(value: str) -> bool:
    text = value.strip("'\"")
    return text.endswith(ROW_FILES) or "://" in text or Path(text).exists() and "/" in text


def _with_data_option(words: list[str]) -> list[str]:
    """Rows of one's own are read as files where no data set is named: the default's own rows would hide them."""
    keys = [word.partition("=")[0] for word in words]
    given = next((key for key in keys if key == "data.train_path" or key.startswith(f"{SOURCES_KEY}.")), None)
    if given is not None and "data" not in keys:
        logger.info("data=jsonl, as %s is given", given)
        return ["data=jsonl", *words]
    return words


def _of_warm_start(words: list[str]) -> list[str]:
    """Words before all others for a run that continues an adapter: what its folder says and the user does not."""
    given = {key.lstrip("+"): value for key, sign, value in (word.partition("=") for word in words) if sign}
    folder = given.get("adapter.init_from", "null").strip("'\"")
    if folder in ("", "null") or "config_path" in given or not Path(folder).exists() and "," in folder:
        return []
    # The formats of adapters, and torch with them.
    from lightning_peft.warm_start import words_of_folder

    return [f"{key}={_value(value)}" for key, value in words_of_folder(folder, set(given))]


def ours(key: str) -> str | None:
    """Our word for a key of another tool; None where it is not known."""
    leaf = key.lstrip("+~-").replace("-", "_").lower()
    return BY_THEIRS.get(leaf) or BY_THEIRS.get(leaf.rpartition(".")[2])


def _without_dashes(word: str) -> str:
    key, sign, value = word.lstrip("-").partition("=")
    known = ours(key) or key.replace("-", "_")
    example = known if "=" in known else f"{known}={value or 'VALUE'}"
    return f"options are key=value without dashes, as in {example}"
