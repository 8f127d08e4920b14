"""Many adapters of one base: mixed batches, swaps, more adapters than slots, a thousand that are registered.

    python benchmarks/serve.py

Processor time of one process and thread, the ways in turn, medians and ratios of neighbours; adapters of rank 8 on all
linear layers of SmolLM2-135M, in the dtype this machine computes in.
"""

import argparse
import copy
import gc
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.machine import fastest_dtype
from benchmarks.results import FOLDER, Results
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.slots import Slots, cast_factors
from lightning_peft.checkpoint.lineage import check_lineage
from lightning_peft.checkpoint.peft_format import read_low_rank, save_adapter
from lightning_peft.compose import compose_config
from lightning_peft.inference.continuous_batching import Decoder, RunningSequence
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.serving.engine import Engine, GenerationRequest
from lightning_peft.serving.tiers import AdapterTiers
from lightning_peft.tasks.text_to_sql.rows import generate_rows

WORDS = ["model=smollm2_135m", "rank=r8", "target_modules=all_linear"]
ROWS, SLOTS, MANY, REGISTERED = 16, 8, 64, 1000
PROMPT_TOKENS = 16


class Bench:
    """The base, eight different adapters on disk, and prompts."""

    def __init__(self, folder: Path, tokens: int, turns: int):
        self.folder, self.tokens, self.turns = folder, tokens, turns
        self.config = compose_config("train", WORDS)
        self.dtype: torch.dtype = getattr(torch, fastest_dtype("cpu"))
        self.base = load_model(self.config.model, self.dtype).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(self.config.model)
        texts = [row["prompt"] for row in generate_rows(8 * ROWS, seed=0, split="test")]
        prompts = [
            ids[:PROMPT_TOKENS] for text in texts if len(ids := self.tokenizer(text)["input_ids"]) >= PROMPT_TOKENS
        ]
        self.prompts: list[list[int]] = prompts[:ROWS]
        model = copy.deepcopy(self.base)
        inject_adapters(model, self.config.adapter)
        for number in range(SLOTS):
            generator = torch.Generator().manual_seed(number)
            for _, adapter in adapters(model):
                adapter.lora_B.weight.data.normal_(std=0.01, generator=generator)  # type: ignore[union-attr, operator]
            save_adapter(model, self.config.adapter, self.path(number), base_model_name="base")

    def path(self, number: int) -> Path:
        """Return the folder of an adapter; beyond the eight written it is made of links to one of those."""
        path = self.folder / f"adapter{number}"
        if number >= SLOTS and not path.is_dir():
            path.mkdir()
            for file in self.path(number % SLOTS).iterdir():
                os.link(file, path / file.name)
        return path

    def in_turn(self, ways: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(self.turns + 1):
            for name, way in ways.items():
                started = time.process_time()
                way()
                if turn:  # the first call allocates
                    seconds[name].append(time.process_time() - started)
        return seconds

    def slots(self, count: int = SLOTS) -> Slots:
        slots = Slots(copy.deepcopy(self.base), count, 8, self.dtype)
        for number in range(min(count, SLOTS)):
            slots.load(number, self.factors(number))
        return slots

    def factors(self, number: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return cast_factors(read_low_rank(self.path(number)), self.dtype)

    def decoded(self, decoder: Decoder, routes: Sequence[int]) -> None:
        sampling = SamplingConfig(max_new_tokens=self.tokens)
        decoder.add(
            *(
                RunningSequence(prompt, sampling, lambda _: True, route, wants_logprobs=False)
                for prompt, route in zip(self.prompts, routes, strict=True)
            )
        )
        while decoder.rows:
            decoder.step()


def mixed(bench: Bench) -> dict[str, Any]:
    """Measure eight adapters in 16 rows, beside one adapter in 16 rows and HF PEFT's adapter_names."""
    slots = bench.slots()
    decoder = Decoder(slots.model, slots)  # type: ignore[arg-type]
    theirs = PeftModel.from_pretrained(copy.deepcopy(bench.base), str(bench.path(0)), adapter_name="a0")
    for number in range(1, SLOTS):
        theirs.load_adapter(str(bench.path(number)), adapter_name=f"a{number}")
    theirs.eval()
    routes = [row % SLOTS for row in range(ROWS)]
    names = [f"a{route}" for route in routes]

    seconds = bench.in_turn(
        {
            "eight": lambda: bench.decoded(decoder, routes),
            "one": lambda: bench.decoded(decoder, [0] * ROWS),
            "base": lambda: bench.decoded(decoder, [-1] * ROWS),
            "peft_eight": lambda: by_peft(theirs, bench, names),
        }
    )
    rate = {name: ROWS * bench.tokens / statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_per_cpu_second": rate,
        "eight_to_one": paired(seconds["one"], seconds["eight"]),
        "eight_to_peft_adapter_names": paired(seconds["peft_eight"], seconds["eight"]),
        "cpu_seconds": seconds,
    }


def by_peft(model: PeftModel | PreTrainedModel, bench: Bench, names: list[str]) -> None:
    ids = torch.tensor(bench.prompts)
    config = GenerationConfig(max_new_tokens=bench.tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, adapter_names=names
        )


def swap(bench: Bench) -> dict[str, Any]:
    """Measure the time to put an adapter into a slot, from host memory and from disk."""
    slots = bench.slots()
    kept = bench.factors(3)
    ways = {"host": lambda: slots.load(1, kept), "disk": lambda: slots.load(1, bench.factors(3))}
    seconds = bench.in_turn(ways)
    return {f"{name}_cpu_milliseconds": 1000 * statistics.median(values) for name, values in seconds.items()}


def tiers_of(bench: Bench, slots: Slots, count: int, host_limit: int) -> AdapterTiers:
    fingerprint = source_fingerprint(bench.config.model)
    tiers = AdapterTiers(slots, host_limit, lambda folder: check_lineage(folder, fingerprint))
    tiers.folders = {f"a{number}": bench.path(number) for number in range(count)}
    return tiers


def more_than_slots(bench: Bench) -> dict[str, Any]:
    """Measure 64 requests, 16 at a time, for 64 adapters over 8 slots, beside the same for one adapter."""
    slots = bench.slots()
    decoder = Decoder(slots.model, slots)  # type: ignore[arg-type]
    tiers = tiers_of(bench, slots, MANY, MANY)
    engine = Engine(decoder, tiers, bench.tokenizer, ROWS, MANY)

    def answered(numbers: Sequence[int]) -> None:
        sampling = SamplingConfig(max_new_tokens=bench.tokens)
        for request, number in enumerate(numbers):
            prompt = bench.prompts[request % ROWS]
            engine.submit(GenerationRequest(prompt, sampling, frozenset(), lambda _: None, bench.path(number)))
        while engine.waiting or engine.running:
            engine.turn()

    seconds = bench.in_turn({"many": lambda: answered(range(MANY)), "one": lambda: answered([0] * MANY)})
    return {"many_to_one_time": paired(seconds["many"], seconds["one"]), "cpu_seconds": seconds}


def registered(bench: Bench) -> dict[str, Any]:
    """Measure the memory with 1,000 adapters asked for once each, above that with 8, serve.host_adapters=8."""
    slots = bench.slots()

    def resident(count: int) -> float:
        tiers = tiers_of(bench, slots, count, 8)
        for number in range(count):
            slot = tiers.acquire(bench.path(number))
            assert slot is not None
            tiers.release(slot)
        gc.collect()
        return resident_mib()

    resident(SLOTS)  # some memory is allocated once
    few = resident(SLOTS)
    many = resident(REGISTERED)
    return {"mib_above_eight": many - few, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def paired(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "mixed": mixed, "swap": swap, "more adapters than slots": more_than_slots, "registered": registered
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=FOLDER / "serve.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.tokens, options.turns)
        settings = {"words": WORDS, "tokens": options.tokens, "turns": options.turns, "dtype": str(bench.dtype)}
        results = Results(options.output, settings)
        for part in options.parts:
            if part not in results.rows:
                results.add(part, PARTS[part](bench))
                print(part, {name: v for name, v in results.rows[part].items() if name != "cpu_seconds"}, flush=True)


if __name__ == "__main__":
    main()
