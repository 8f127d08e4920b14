"""The card of an adapter or merged model, `README.md`: written from the files beside it, so it can be written again."""

import json
import logging
from pathlib import Path
from typing import Any

from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.lineage import Lineage, read_lineage
from lightning_peft.checkpoint.peft_words import OF_REWARDS
from lightning_peft.strict_json import read_object

logger = logging.getLogger(__name__)

FILE_NAME = "README.md"
MARK = "<!-- written by lightning-peft -->"
"""A line in every card of ours; a file without it belongs to somebody else, and is left as it is."""


UNKNOWN_PROMPTS = (
    "## Prompts\n\nThe adapter's folder does not say how prompts were written in its training, nor with which system "
    "prompt; send what its author says. `lightning-peft generate` writes them by the chat template of the tokenizer."
)


def write_card(
    folder: Path, run: Path | None = None, lineage: Lineage | None = None, knows_prompts: bool = True
) -> None:
    """Write the card of a tuned or merged folder from its lineage, prompt layout and receipt, and its run's scores.

    Scores are read from `result.json` and `evaluation.json` in `run`. `lineage` is the folder's own, unless given, as a
    merged model has none. Without `knows_prompts` the layout is that of the tokenizer, and not of a training. A
    README.md of somebody else stays, and a folder whose origin nobody knows gets none.
    """
    path = folder / FILE_NAME
    lineage = lineage or read_lineage(folder)
    if lineage is None or path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    adapter = _json(folder / "adapter_config.json")
    base = adapter.get("base_model_name_or_path")
    result, evaluation = (_json(run / name) if run is not None else {} for name in ("result.json", "evaluation.json"))
    parts = [
        _front_matter(lineage, base, adapter),
        f"# {'Adapter of' if adapter else 'Fine-tuned'} {lineage.base_name}",
        MARK,
        _facts(lineage, adapter),
        _commands(lineage),
        _scores(result, evaluation, _json(folder / "merge_receipt.json")),
        _prompt(_json(folder / "prompt_layout.json")) if knows_prompts else UNKNOWN_PROMPTS,
        _use_of_rewards(base) if adapter.get("task_type") == OF_REWARDS else _use(bool(adapter), bool(lineage.parents)),
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _front_matter(lineage: Lineage, base: str | None, adapter: dict[str, Any]) -> str:
    task = "text-classification" if adapter.get("task_type") == OF_REWARDS else "text-generation"
    lines = [f"library_name: {'peft' if adapter else 'transformers'}", f"pipeline_tag: {task}"]
    if base is not None and not base.startswith("/"):
        lines.insert(0, f"base_model: {base}")
    tags = ["lightning-peft", lineage.method]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _facts(lineage: Lineage, adapter: dict[str, Any]) -> str:
    config = lineage.config
    data = config.get("data", {})
    rows = data.get("train_path") or data.get("hub_name") or data.get("source")
    trainer = config.get("trainer", {})
    steps, epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    length = f"{steps} steps" if steps not in (None, -1) else f"{epochs} epochs"
    own_run = len(lineage.parents) <= 1  # with several, the config is that of the first alone
    facts = {
        "base": f"{lineage.base_name}, weights {lineage.base_fingerprint[:12]}",
        "method": config.get("method") or lineage.method,
        "made of": "; ".join(
            f"{part['weight']:g} x {part['name']} ({part['method']}, weights {part['adapter_sha256'][:12]})"
            for part in lineage.parents
        ),
        "reconstructed": METHODS[lineage.method].reconstruction if lineage.method in METHODS else None,
        "rank and alpha": f"{adapter['r']} and {adapter.get('lora_alpha')}" if "r" in adapter else None,
        "base quantised as": lineage.quantization if lineage.quantization != "none" else None,
        "precision": lineage.precision,
        "rows": f"{_listed(rows)}, fingerprint {(lineage.data_fingerprint or 'unknown')[:12]}"
        if rows and own_run
        else None,
        "length": length if trainer and own_run else None,
        "learning rate": config.get("optimizer", {}).get("lr") if own_run else None,
        "seed": config.get("seed") if own_run else None,
        "written by": f"{lineage.created_by} ({', '.join(f'{k} {v}' for k, v in sorted(lineage.versions.items()))})",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items() if value)])


def _commands(lineage: Lineage) -> str:
    if not lineage.commands or len(lineage.parents) > 1:
        return ""
    return "## Commands\n\nTrained by:\n\n```bash\n" + "\n".join(lineage.commands) + "\n```"


def _scores(result: dict[str, Any], evaluation: dict[str, Any], receipt: dict[str, Any]) -> str:
    rows = {name: result.get(name) for name in ("steps", "train_loss", "validation_loss")} | result.get("metrics", {})
    lines = [f"| {name.replace('_', ' ')} | {_number(value)} |" for name, value in rows.items() if value is not None]
    for model in ("base", "adapter"):
        scores = evaluation.get(model) or {}
        found = {"loss": scores.get("loss"), **(scores.get("metrics") or {})}
        lines += [
            f"| {model}: {name.replace('_', ' ')} | {_number(value)} |"
            for name, value in found.items()
            if value is not None
        ]
    lines += [
        f"| merged against adapter: {name.replace('_', ' ')} | {_number(value)} |"
        for name, value in receipt.items()
        if name in ("mean_kl", "top1_agreement", "recovered") and value is not None
    ]
    return "\n".join(["## Scores", "", "| | |", "|---|---|", *lines]) if lines else ""


def _prompt(layout: dict[str, Any]) -> str:
    if not layout:
        return ""
    kinds = {"chat": "the chat template", "raw": "no template: the prompt as it is", "text": "text to be continued"}
    lines = [f"## Prompts\n\nTrained with {kinds.get(layout['kind'], layout['kind'])}."]
    if layout.get("system_prompt"):
        lines.append(f"Send this system prompt, which it was trained with:\n\n```text\n{layout['system_prompt']}\n```")
    elif layout["kind"] == "chat":
        lines.append(
            "No system prompt is put before a prompt. Rows that began with a system message were trained with it: send "
            "such a message with prompts of their kind."
        )
    if layout.get("template_options"):
        lines.append(f"Variables of the template: `{json.dumps(layout['template_options'])}`.")
    if layout.get("tools"):
        lines.append("All rows shared these tools:\n\n```json\n" + json.dumps(layout["tools"], indent=2) + "\n```")
    return "\n\n".join(lines)


def _use(is_adapter: bool, is_converted: bool) -> str:
    if not is_adapter:
        return "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n" + (
            'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_REPOSITORY")\n```'
        )
    again = (
        "`parents` of `lineage.json` names the adapters that it was made of, `convert_receipt.json` what that cost."
        if is_converted
        else "`config` of `lineage.json` is the whole config of the run; `lightning-peft train "
        "config_path=RUN/config.yaml` trains it again."
    )
    return f"## Use\n\n```bash\nlightning-peft generate adapter_path=FOLDER prompt='...'\n```\n\n{again}"


def _use_of_rewards(base: str | None) -> str:
    return (
        "## Use\n\nA reward model: one number for a conversation, larger for the better answer, of its last token.\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForSequenceClassification\n\n"
        f'base = AutoModelForSequenceClassification.from_pretrained("{base or "BASE"}", num_labels=1)\n'
        'model = PeftModel.from_pretrained(base, "FOLDER_OR_REPOSITORY")\n```\n\n'
        "transformers reads the last token that is not `pad_token_id`: where a conversation ends in that one, score it "
        "by itself with `model.config.pad_token_id = None`.\n\n"
        "```bash\nlightning-peft evaluate adapter_path=FOLDER\n```"
    )


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing, with a logged line, where it is damaged: the model stands by itself."""
    try:
        return read_object(path, "the card leaves out what it says") if path.is_file() else {}
    except ValueError as error:
        logger.warning("%s", error)
        return {}
