"""`lightning-peft push ADAPTER repo=OWNER/NAME`: an adapter or merged model on the hub, with its card."""

import logging
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from lightning_peft.checkpoint.model_card import write_card
from lightning_peft.command_configs.of_adapters import PushConfig
from lightning_peft.commands.adapted import best_of_sweep
from lightning_peft.inference.load import MODEL_FOLDER, tuned_folder

logger = logging.getLogger(__name__)

NOT_SENT = ["*.ckpt", "checkpoints/*", "*.lock", ".*"]


def push(config: PushConfig) -> str:
    """Upload a tuned folder and return its address. Where that cannot be, say the command that does it later.

    Raises ValueError for a folder that holds neither, for an invalid name, and for an upload that the hub refuses.
    """
    folder = pushed_folder(best_of_sweep(config.adapter_path))
    try:
        validate_repo_id(config.repo)
    except HFValidationError as error:
        raise ValueError(
            f"repo={config.repo}: not a name such as me/my-adapter ({str(error).splitlines()[0]})"
        ) from error
    write_card(folder, folder.parent)
    by_hand = f"hf upload {config.repo} {folder}"
    there = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = list(filter_repo_objects(there, ignore_patterns=NOT_SENT))
    size = sum((folder / path).stat().st_size for path in files)
    if config.dry_run:
        print(f"{folder}: {len(files)} files, {size / 2**20:.1f} MiB, to {config.repo}: {', '.join(map(str, files))}")
        print(by_hand)
        return by_hand
    api = HfApi()
    try:
        api.create_repo(config.repo, private=config.private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=config.repo, folder_path=folder, ignore_patterns=NOT_SENT, commit_message=config.message
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = "log in with `hf auth login`, as somebody who may write there" if status in (401, 403) else by_hand
        raise ValueError(f"repo={config.repo}: the hub refuses it ({str(error).splitlines()[0]}); {remedy}") from error
    except Exception as error:
        # The hub's client has changed its HTTP library before; all of them call it RequestError.
        is_offline = any(kind.__name__ == "RequestError" for kind in type(error).__mro__)
        if not is_offline and not isinstance(error, OSError | OfflineModeIsEnabled):
            raise
        raise ValueError(
            f"repo={config.repo}: the hub cannot be reached; {folder} is ready, and `{by_hand}` sends it"
        ) from error
    address = str(getattr(sent, "repo_url", None) or f"https://huggingface.co/{config.repo}")
    print(address)
    return address


def pushed_folder(path: str) -> Path:
    """Return the folder to send: a merged model's own, else the adapter or model of a run."""
    if (Path(path) / "config.json").is_file() and not (Path(path) / MODEL_FOLDER).is_dir():
        return Path(path)
    return tuned_folder(path)
