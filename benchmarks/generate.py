"""Generated tokens a second: ours beside transformers' generate, over our adapter, over HF PEFT's and over the base.

One process and thread, one model, the ways in turn; tokens of all rows by processor seconds, medians and their ratios;
in the dtype this machine computes in, and in fp32, where greedy answers are to be the same.
`before` is transformers' generate over our adapted model, which generated all answers before there was a decoder.

    python benchmarks/generate.py
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.machine import fastest_dtype
from benchmarks.results import FOLDER, Results
from lightning_peft.adapters.inject import adapters, disable_adapters, inject_adapters
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.compose import compose_config
from lightning_peft.inference.continuous_batching import Decoder, RunningSequence
from lightning_peft.inference.own_settings import declared_end_ids
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.tasks.text_to_sql.rows import generate_rows

WORDS = ["model=smollm2_135m", "rank=r16", "target_modules=all_linear"]


def by_transformers(model: PreTrainedModel | PeftModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Generate greedy answers of `count` tokens by transformers' generate; the prompts are of one length."""
    config = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )  # fmt: skip
    ids = torch.tensor(prompts)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return output[:, ids.shape[1] :].tolist()


def by_ours(model: PreTrainedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Generate greedy answers of `count` tokens by our decoder, its preparation included."""
    sampling = SamplingConfig(max_new_tokens=count)
    rows = [RunningSequence(prompt, sampling, lambda _: True, wants_logprobs=False) for prompt in prompts]
    decoder = Decoder(model)
    decoder.add(*rows)
    while decoder.rows:
        decoder.step()
    return [row.tokens for row in rows]


def prompts_of(tokenizer: Any, batch: int, length: int) -> list[list[int]]:
    """Return prompts of one length, all different."""
    texts = [row["prompt"] for row in generate_rows(4 * batch + 16, seed=0, split="test")]
    found = [ids[:length] for text in texts if len(ids := tokenizer(text)["input_ids"]) >= length]
    return found[:batch]


def measure(batch: int, count: int, turns: int, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    config = compose_config("train", WORDS)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, dtype).eval()
    inject_adapters(model, config.adapter)
    generator = torch.Generator().manual_seed(0)
    for _, adapter in adapters(model):
        adapter.lora_B.weight.data.normal_(std=0.01, generator=generator)  # type: ignore[union-attr, operator]
    model.eval()
    save_adapter(model, config.adapter, folder, base_model_name="base")
    theirs = PeftModel.from_pretrained(load_model(config.model, dtype).eval(), str(folder)).eval()
    prompts = prompts_of(tokenizer, batch, 48)

    def base() -> list[list[int]]:
        with disable_adapters(model):
            return by_transformers(model, prompts, count)

    def our_base() -> list[list[int]]:
        with disable_adapters(model):
            return by_ours(model, prompts, count)

    ways: dict[str, Callable[[], list[list[int]]]] = {
        "ours": lambda: by_ours(model, prompts, count),
        "before": lambda: by_transformers(model, prompts, count),
        "peft": lambda: by_transformers(theirs, prompts, count),
        "base": base,
        "our_base": our_base,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[list[int]]] = {}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for name, way in ways.items():
                started = time.process_time()
                answers[name] = way()
                if turn:  # the first one allocates
                    seconds[name].append(time.process_time() - started)
    rate = {name: batch * count / statistics.median(values) for name, values in seconds.items()}
    ends = declared_end_ids(model)  # transformers pads what follows one of them
    same = [
        until_end(ours, ends) == until_end(theirs, ends)
        for ours, theirs in zip(answers["ours"], answers["before"], strict=True)
    ]
    return {
        "tokens_per_cpu_second": rate,
        "ours_to": {name: statistics.median(map(ratio, seconds[name], seconds["ours"])) for name in ways},
        "cpu_seconds": seconds,
        "same_greedy_answers_as_before": f"{sum(same)} of {len(same)}",
    }


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def ratio(theirs: float, ours: float) -> float:
    return theirs / ours


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=FOLDER / "generate.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"words": WORDS, "tokens": options.tokens, "prompt_tokens": 48}
    results = Results(options.output, settings)
    for dtype in sorted({fastest_dtype("cpu"), "float32"}):
        for batch in options.batches:
            if (key := f"batch {batch}, {dtype}") in results.rows:
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = measure(batch, options.tokens, options.turns, getattr(torch, dtype), Path(folder) / "adapter")
            results.add(key, row)
            to = ", ".join(f"{value:.2f}x {name}" for name, value in row["ours_to"].items() if name != "ours")
            rate, same = row["tokens_per_cpu_second"]["ours"], row["same_greedy_answers_as_before"]
            print(f"{key}: {rate:.0f} tokens by cpu second, {to}; {same} the same", flush=True)


if __name__ == "__main__":
    main()
