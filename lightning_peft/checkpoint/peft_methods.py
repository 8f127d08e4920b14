"""HF PEFT's words for our methods. A new method is one row of `PEFT_METHODS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.bias import Bias

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PeftMethod:
    """How HF writes down one of our methods."""

    peft_type: str
    tensors: tuple[str, ...]
    """Endings of the tensor names of one layer; dimension 0 of the first that a layer has is its rank."""
    options: dict[str, str] = field(default_factory=dict)
    """Field of our config -> HF's word."""
    flags: dict[str, bool] = field(default_factory=dict)
    """HF's words that tell this method from others of the same type."""
    constants: dict[str, Any] = field(default_factory=dict)
    """HF's words that are always written alike."""
    rank_word: str | None = "r"
    alpha_word: str | None = None
    rank_offset: float = 0.0
    """HF divides alpha by the rank plus this."""
    patterns: tuple[str, ...] = ()
    """Those of rank_pattern and alpha_pattern that HF knows for this type."""
    in_peft: bool = True
    """False when HF has no such method, so that only we can read the folder."""
    write_more: Callable[[Mapping[str, Adapter], dict[str, Any]], dict[str, Any]] | None = None
    """(layers by name, HF's words so far) -> HF's words that depend on the layers."""
    read_more: Callable[[Mapping[str, Any], Shapes], dict[str, Any]] | None = None
    """(HF's words, shapes by layer name) -> fields of our config that depend on them."""


def write_feed_forward(layers: Mapping[str, Adapter], words: dict[str, Any]) -> dict[str, Any]:
    """IA3: layers rescaled at their input. HF wants each to be a word of target_modules too."""
    at_input = {name for name, layer in layers.items() if getattr(layer, "scales_input", False)}
    leaves = {name.rpartition(".")[2] for name in at_input}
    if leaves <= set(words["target_modules"]) and at_input == {n for n in layers if n.rpartition(".")[2] in leaves}:
        return {"feedforward_modules": sorted(leaves)}
    return {"feedforward_modules": sorted(at_input), "target_modules": sorted(layers)}


def read_feed_forward(words: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """IA3: a vector of shape (1, in_features) rescales the input."""
    return {"feed_forward": sorted(name for name, shape in shapes.items() if shape[0] == 1)}


def read_rank_budget(words: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """AdaLoRA: HF stores the ranks left after the cuts, which may be below the target of the mean."""
    ranks = [shape[0] for shape in shapes.values()]
    return {"target_rank": min(words.get("target_r", 8), max(set(ranks), key=ranks.count))}


def read_bias(words: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """LoRA and its variants: which biases were trained."""
    return {"bias": Bias[words.get("bias", "none")]}


# True means "start A and B as usual": any other initialisation could change the base while PEFT loads.
LORA_CONSTANTS = {"init_lora_weights": True}
LORA_OPTIONS = {"dropout": "lora_dropout", "rank_stabilized": "use_rslora", "bias": "bias"}
LORA_TENSORS = ("lora_A.weight", "lora_embedding_A", "lora_B.weight", "lora_embedding_B")
LORA_PATTERNS = ("rank_pattern", "alpha_pattern")
LORA = PeftMethod(
    "LORA",
    LORA_TENSORS,
    LORA_OPTIONS,
    {"use_dora": False},
    LORA_CONSTANTS,
    alpha_word="lora_alpha",
    patterns=LORA_PATTERNS,
    read_more=read_bias,
)

PEFT_METHODS: dict[str, PeftMethod] = {
    "lora": LORA,
    "lora_fa": LORA,
    "dora": PeftMethod(
        "LORA",
        (*LORA_TENSORS, "lora_magnitude_vector"),
        LORA_OPTIONS,
        {"use_dora": True},
        LORA_CONSTANTS,
        alpha_word="lora_alpha",
        patterns=LORA_PATTERNS,
        read_more=read_bias,
    ),
    "adalora": PeftMethod(
        "ADALORA",
        ("lora_A", "lora_B", "lora_E"),
        {
            "dropout": "lora_dropout",
            "every_n_steps": "deltaT",
            "beta1": "beta1",
            "beta2": "beta2",
            "orthogonality": "orth_reg_weight",
            "target_rank": "target_r",
        },
        # PEFT refuses to load a config without a number of steps; it means nothing once training is over.
        constants={**LORA_CONSTANTS, "bias": "none", "total_step": 1, "tinit": 0, "tfinal": 0},
        rank_word="init_r",
        alpha_word="lora_alpha",
        rank_offset=1e-5,
        read_more=read_rank_budget,
    ),
    "vera": PeftMethod(
        "VERA",
        ("vera_lambda_d", "vera_lambda_b"),
        {
            "dropout": "vera_dropout",
            "initial_d": "d_initial",
            "projection_seed": "projection_prng_key",
            "save_projection": "save_projection",
        },
        constants={"bias": "none", "init_weights": True},
    ),
    "ia3": PeftMethod("IA3", ("ia3_l",), rank_word=None, write_more=write_feed_forward, read_more=read_feed_forward),
    # PEFT 0.21 has a rank_pattern for HiRA but builds every layer at `r`.
    "hira": PeftMethod("HIRA", ("hira_A", "hira_B"), {"dropout": "hira_dropout"}),
    "miss": PeftMethod(
        "MISS", ("miss_block",), {"dropout": "miss_dropout"}, constants={"bias": "none", "init_weights": True}
    ),
    "intrinsic": PeftMethod(
        "INTRINSIC",
        (),
        {
            "dimension": "dimension",
            "structure_aware": "structure_aware",
            "projection_seed": "projection_seed",
        },
        rank_word=None,
        in_peft=False,
    ),
}
"""Method -> how it is written. When reading, the first row whose type and flags fit is the method."""

SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "init_weights": (None, True, False, "gaussian"),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
}
"""HF features that we do not have, with the values at which they are off."""

# Which layers were adapted at which rank is read off the tensors; the others say how training began or was run.
WITHOUT_EFFECT = """
    target_modules exclude_modules layers_to_transform layers_pattern rank_pattern auto_mapping base_model_name_or_path
    corda_config ensure_weight_tying eva_config fan_in_fan_out feedforward_modules inference_mode init_ia3_weights
    loftq_config lora_ga_config megatron_core mini_r peft_version qalora_group_size r revision runtime_config task_type
    velora_config
""".split()
READ_HERE = ("peft_type", "alpha_pattern", "bias", "init_lora_weights", "modules_to_save")

KEEPS_BASE = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base weights alone."""
REWRITES_BASE = ("pissa", "olora")
"""Those that take the start of A and B out of the base, in a way we repeat exactly; they are options of ours too."""
