"""The groups of parameters that share a learning rate and a weight decay."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def is_lora_B(name: str) -> bool:
    """Return whether a parameter is the B of a low-rank product, linear or embedding."""
    return any(part in ("lora_B", "lora_embedding_B") for part in name.split("."))


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    lr: float,
    weight_decay: float,
    lora_plus_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Return groups with a `name` each for the logs, in an order that depends on nothing but the kinds that exist.

    Without a ratio they are "decay" and "no_decay". With one (LoRA+, Hayou et al. 2024, arXiv:2402.12354) they are "B"
    at ratio x lr, "A" (every other matrix) and "no_decay" at lr. Vectors and scalars - biases, norms, DoRA's
    magnitudes, VeRA's - are never decayed and keep the base rate; HF PEFT raises theirs by the ratio. The B of an
    embedding is raised like any B, while HF gives embeddings a fixed rate of 1e-6. Frozen parameters are left out.
    """
    matrices, raised, vectors = [], [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif lora_plus_ratio is not None and is_lora_B(name):
            raised.append(parameter)
        else:
            matrices.append(parameter)
    if lora_plus_ratio is not None and not raised:
        raise ValueError(
            f"optimizer.lora_plus_ratio={lora_plus_ratio}: no trainable parameter is a lora_B; "
            "leave it null for methods without one"
        )
    rows = [
        ("decay" if lora_plus_ratio is None else "A", matrices, lr, weight_decay),
        ("B", raised, lr * (lora_plus_ratio or 1.0), weight_decay),
        ("no_decay", vectors, lr, 0.0),
    ]
    return [
        {"name": name, "params": parameters, "lr": rate, "weight_decay": decay}
        for name, parameters, rate, decay in rows
        if parameters
    ]
