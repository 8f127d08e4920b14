"""Host memory and speed of reading rows: `python benchmarks/data.py memory|speed [ROWS]`.

memory: the anonymous memory of a process that has set up its data, by rows of 200 tokens, and the slope of it.
speed: seconds of processor time to read and tokenise plain rows; run it in two checkouts, in turns, to compare them.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lightning_peft.data.config import DataConfig
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.samples import make_samples
from lightning_peft.models.loading import load_tokenizer
from lightning_peft.models.source import ModelConfig

TOKENS = 200


def write_rows(path: Path, rows: int) -> None:
    """Write prompts and answers of about `TOKENS` tokens of the default model's tokenizer."""
    rng, words = random.Random(0), "the of and to in is that it was for on are with they at be this from have".split()
    with path.open("w") as file:
        for number in range(rows):
            text = " ".join(rng.choices(words, k=TOKENS - 27))
            file.write(json.dumps({"prompt": f"Question {number}", "completion": text}) + "\n")


def anonymous_mib() -> float:
    """Return the memory of this process that is not mapped from files."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


def hold(path: str, cache: str) -> None:
    """Set up the rows of a file as a training holds them; print the samples' tokens and the memory that they took."""
    tokenizer = load_tokenizer(ModelConfig())
    before = anonymous_mib()
    config = DataConfig(train_path=path, max_length=512, cache_dir=cache if cache != "none" else None)
    module = SFTDataModule(config, tokenizer, 0)
    module.setup()
    next(iter(module.train_dataloader()))
    print(json.dumps({"tokens": module.train_audit.tokens, "mib": anonymous_mib() - before}))


def memory(rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("none", f"{folder}/cache"):
            found = []
            for count in (rows // 5, rows):
                path = Path(folder) / f"{count}.jsonl"
                write_rows(path, count)
                words = [sys.executable, __file__, "hold", str(path), cache]
                for _ in range(1 if cache == "none" else 2):  # the second start maps what the first has kept
                    held = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                found.append(held["mib"])
                print(f"{count} rows, {held['tokens'] / count:.0f} tokens each, cache {cache}: {held['mib']:.0f} MiB")
            slope = (found[1] - found[0]) / (rows - rows // 5) * 1e6 / 1024
            print(f"cache {cache}: {slope:.2f} GiB for each million rows")


def speed(rows: int) -> None:
    tokenizer = load_tokenizer(ModelConfig())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        config = DataConfig(train_path=str(path), validation_fraction=0.0, cache_dir=None)
        make_samples(config, "train", tokenizer)
        started = time.process_time()
        make_samples(config, "train", tokenizer)
        print(f"{rows / (time.process_time() - started):.0f} rows a second of processor time")


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(*sys.argv[2:])
    else:
        {"memory": memory, "speed": speed}[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 100_000)
