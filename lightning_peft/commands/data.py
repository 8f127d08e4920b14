"""`lightning-peft data`: the rows that `train` would be given with the same words, read without a model."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lightning_peft.command_configs.of_runs import DataCommandConfig
from lightning_peft.data.audit import KIND_STYLES, preview_kinds, words_of
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.models.loading import load_tokenizer, model_context, model_vocabulary
from lightning_peft.training.teacher import teacher_context

BINS = 12
"""Bars of the histogram of lengths."""


def data(config: DataCommandConfig) -> dict[str, Any]:
    """Show samples, the audit and the lengths of the training rows; return the counts.

    Raises ValueError for anything wrong with the rows and, with `strict`, for anything the audit warns of.
    """
    tokenizer = load_tokenizer(config.model)
    context, vocabulary = model_context(config.model), model_vocabulary(config.model, tokenizer)
    of_teacher = teacher_context(config.objective, config.model)
    module = SFTDataModule(config.data, tokenizer, config.seed, context, 1, vocabulary, of_teacher)
    module.setup()
    console = Console()
    samples = module.training_samples
    show_samples(console, samples, tokenizer, config.samples)
    counts, edges = np.histogram(samples.lengths, bins=min(BINS, max(samples.lengths)))
    show_lengths(console, counts, edges)
    if config.histogram_path is not None:
        Path(config.histogram_path).write_bytes(bar_chart(counts))
    audit = module.train_audit
    if len(module.train_audits) > 1:
        for name, one in module.train_audits.items():
            console.print(*(f"{name}: {line}" for line in one.lines()), sep="\n")
    console.print(*audit.lines(), sep="\n")
    audits = [*module.train_audits.items(), *module.validation_audits.items()]
    warnings = [f"{name}: " * bool(name) + line for name, one in audits for line in one.warnings()]
    if config.strict and warnings:
        raise ValueError(f"strict=true: {'; '.join(warnings)}")
    return {
        "rows": audit.rows, "samples": audit.samples, "tokens": audit.tokens, "trained": audit.kinds,
        "warnings": warnings,
    }  # fmt: skip


def show_samples(console: Console, samples: Any, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Print some samples, trained tokens coloured by what they are, or marked where there are no colours."""
    has_colours = console.color_system is not None
    legend = Text("trained: ")
    for kind, style in KIND_STYLES.items():
        legend.append(f" {words_of(kind)} " if has_colours else f"[[{words_of(kind)}: ...]]", style=style).append(" ")
    console.print(legend)
    for index in range(min(count, len(samples))):
        sample = samples[index]
        standing = "" if sample.standing is None else f" ({sample.standing.name})"
        console.rule(f"sample {index + 1}{standing}, {samples.lengths[index]} tokens")
        console.print(preview_kinds(sample, tokenizer, has_colours))
    console.rule()


def show_lengths(console: Console, counts: np.ndarray, edges: np.ndarray) -> None:
    table = Table("tokens", "samples", "", title="lengths of samples")
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        table.add_row(f"{low:.0f} to {high:.0f}", f"{count:,}", "█" * round(40 * count / counts.max()))
    console.print(table)


def bar_chart(counts: np.ndarray, width: int = 480, height: int = 240) -> bytes:
    """Return a grey PNG of `width` x `height` pixels with a bar for each count."""
    pixels = np.full((height, width), 255, np.uint8)
    step = width // len(counts)
    for number, count in enumerate(counts):
        top = height - round((height - 8) * count / counts.max())
        pixels[top:, number * step + 2 : (number + 1) * step - 2] = 70
    lines = np.hstack([np.zeros((height, 1), np.uint8), pixels]).tobytes()  # each begins with its filter: none

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
