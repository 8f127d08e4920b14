"""The way a model makes logits of its decoder's hidden states, read off its own forward pass.

The loss runs decoder and head apart, so that logits are never held whole. The steps between the two - softcaps, scales,
multipliers, another layer - are no matter of three attribute names: the model runs once on a few tokens, with numbers
put in the head's place, and what comes out is compared with what is rebuilt here.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.models.blocks import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it

logger = logging.getLogger(__name__)

Function = Callable[[Tensor], Tensor]

PROBED_TOKENS = 64
"""Tokens of a batch's first row that the model is run on."""
LARGEST_LOGIT = 60.0
"""Head outputs put in go from minus this to this: far into any softcap."""


OTHER_DTYPES = re.compile(r"same dtype|expected scalar type|dtypes? match")
"""Torch's words about a product of two dtypes."""


class LogitPath(NamedTuple):
    """logits = transform(head(scaled(hidden))); None stands for no change."""

    scaled: Function | None = None
    """The change before the head."""
    transform: Function | None = None
    """The change after the head."""


class Observed(NamedTuple):
    """One forward pass of the model."""

    head_input: Tensor
    head_output: Tensor
    """(1, T, V), numbers that were put in the place of the head's own."""
    logits: Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Return the difference that rounding explains, as a share of the largest value."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2**-5


def rounded_in(values: Tensor) -> torch.dtype:
    """Return the dtype that a model computed these values in: autocast multiplies in its own, and may hand on fp32."""
    device = values.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype


def own_inputs(input_ids: Tensor) -> dict[str, Any]:
    """Return the arguments of the model's own forward pass on rows that are one sample each."""
    return {"input_ids": input_ids, "use_cache": False}


@torch.no_grad()
def find_logit_path(
    model: "PreTrainedModel", input_ids: Tensor, decoder_inputs: Callable[[Tensor], dict[str, Any]]
) -> LogitPath | None:
    """Return the path of `model`, from a row of token ids (1, T); None, with a logged line, where it is not rebuilt.

    `decoder_inputs` makes the decoder's arguments of one row. The model is run twice, in eval mode, and in fp32 where
    all its weights are: what autocast rounds is larger than what some models do before their heads.
    """
    ids = input_ids[:1, :PROBED_TOKENS]
    is_fp32 = all(p.dtype is torch.float32 for p in model.parameters() if p.is_floating_point())
    with in_eval_mode(model), torch.autocast(ids.device.type, enabled=False) if is_fp32 else nullcontext():
        path = _find(model, ids, decoder_inputs)
    if isinstance(path, LogitPath):
        return path
    logger.warning(
        "%s %s: the loss takes the model's own logits, which needs the memory of all of them",
        type(model).__name__,
        path,
    )
    return None


@torch.no_grad()
def refuse_foresight(model: "PreTrainedModel", input_ids: Tensor) -> None:
    """Raise ValueError where the model's logits change with tokens behind them, from a row of token ids (1, T).

    A row and its padding would be told apart by no mask then, and a next-token loss would teach the model to copy.
    ValueError as well where its code does not run in the dtype of its weights, as xLSTM's in 16 bits, or gives logits
    that are not finite.
    """
    ids = input_ids[:1, :PROBED_TOKENS]
    if ids.shape[1] < 2:
        return
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] - 1).abs()  # another token, whatever the row: every rank runs the model
    with in_eval_mode(model):
        try:
            own, other = model(**own_inputs(torch.cat([ids, changed]))).logits[:, :-1]
        except RuntimeError as error:
            if OTHER_DTYPES.search(str(error)) is None:
                raise
            raise ValueError(
                f"{type(model).__name__} of transformers does not run in this precision ({str(error).strip()}); use "
                "trainer.precision=32-true"
            ) from error
    refuse_not_finite(model, own)
    differences = token_differences(other, own)
    # In 16 bits the choice of experts may flip for a token, in fp32 the tokens before the changed one keep theirs.
    dtype = rounded_in(own)
    difference = float(differences.max() if dtype is torch.float32 else differences.median())
    if difference > tolerance(dtype):
        raise ValueError(
            f"{type(model).__name__} sees the tokens that it is to predict: logits differ by {difference:.1%} with the "
            "last token of a row alone; a next-token loss needs a causal model (is_decoder=true in the config.json of "
            "a model of BERT's kind)"
        )


def refuse_not_finite(model: nn.Module, logits: Tensor) -> None:
    """Raise ValueError for logits that are no numbers; minus infinity, of a token that is never said, is one."""
    if not (logits.isnan() | (logits == float("inf"))).any():
        return
    from torch.distributed.tensor import DTensor  # this takes a second, which only training needs

    parts = {n: w.to_local() if isinstance(w, DTensor) else w for n, w in model.named_parameters()}
    if wrong := [name for name, part in parts.items() if part.is_floating_point() and not part.isfinite().all()]:
        raise ValueError(
            f"{len(wrong)} weights of {type(model).__name__} are not finite: {', '.join(wrong[:3])}; the checkpoint is "
            "damaged or its training diverged: take another one"
        )
    remedy = "use trainer.precision=32-true"
    if (dtype := rounded_in(logits)) is torch.float32:
        remedy = "its config.json is of other weights, or its weights are damaged"
    raise ValueError(
        f"{type(model).__name__} gives logits that are not finite in {dtype}, though its weights are: {remedy}"
    )


@torch.no_grad()
def warn_of_own_loss(model: "PreTrainedModel", input_ids: Tensor) -> None:
    """Log what the loss that the model computes by itself has beside the cross entropy, from token ids (1, T).

    A mixture adds how unevenly its routers choose where output_router_logits is set, others the size of their logits.
    """
    ids = input_ids[:1, :PROBED_TOKENS]
    if ids.shape[1] < 2 or "labels" not in inspect.signature(model.forward).parameters:
        return
    with in_eval_mode(model):
        seen = model(**own_inputs(ids), labels=ids)
    ours = F.cross_entropy(seen.logits[0, :-1].float(), ids[0, 1:])
    # Both are of the same logits, in fp32.
    if seen.loss is None or abs(float(seen.loss) / float(ours) - 1) <= tolerance(torch.float32):
        return
    options = model.config.get_text_config().to_dict().items()
    named = [
        f"{name}={x:g}" for name, x in options if type(x) in (int, float) and x and ("loss" in name or "coef" in name)
    ]
    logger.warning(
        "%s has a loss of %.4g by itself; here it is trained on the cross entropy of the next tokens alone, %.4g%s",
        type(model).__name__, float(seen.loss), float(ours), f" ({', '.join(named)})" if named else "",
    )  # fmt: skip


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep the model from dropping anything out and from compiling anything, inside the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


def _find(model: "PreTrainedModel", ids: Tensor, decoder_inputs: Callable[[Tensor], dict[str, Any]]) -> LogitPath | str:
    """Return the path, or in words what the model does otherwise."""
    head = model.get_output_embeddings()
    if head is None:
        return "names no output head"
    decoder = decoder_of(model)
    hidden = None if decoder is model else getattr(decoder(**decoder_inputs(ids)), "last_hidden_state", None)
    if hidden is None:
        return "has no decoder that gives hidden states"
    seen = observe(model, head, own_inputs(ids))
    if seen is None:
        return "runs its output head other than once"
    if seen.head_input.shape != hidden.shape:
        return f"feeds its head {tuple(seen.head_input.shape)} where the decoder gives {tuple(hidden.shape)}"
    if seen.logits.shape != seen.head_output.shape:
        return "changes the shape of its head's output"
    fed = seen.head_input.to(hidden.dtype)  # a head that trains in fp32 casts what it is fed
    scaled = next((f for f in scalings(model) if is_same(apply(f, hidden), fed)), None)
    if scaled is None:
        return "changes hidden states before its head"
    candidates = [*scalings(model), *softcaps(model)]
    transform = next((f for f in candidates if is_same(apply(f, seen.head_output), seen.logits)), None)
    if transform is None:
        return "changes logits after its head in a way not known here"
    return LogitPath(scaled[0], transform[0])


def observe(model: "PreTrainedModel", head: nn.Module, inputs: dict[str, Any]) -> Observed | None:
    """Run the forward pass with the head's output replaced by numbers from -LARGEST_LOGIT to LARGEST_LOGIT."""
    calls: list[tuple[Tensor, Tensor]] = []

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        numbers = torch.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, output.shape[-1], device=output.device)
        put_in = numbers.to(output.dtype).expand(output.shape).clone()
        calls.append((args[0], put_in.clone()))
        return put_in

    hook = head.register_forward_hook(replace)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    return Observed(*calls[0], logits) if len(calls) == 1 else None


Candidate = tuple[Function | None]
"""A function, or none; in a tuple, so that finding none differs from not finding."""


def scalings(model: "PreTrainedModel") -> Iterator[Candidate]:
    """Yield no change, and products and quotients with every number of the model's configuration."""
    yield (None,)
    for value in numbers(model):
        yield (partial(torch.mul, other=value),)
        yield (partial(torch.div, other=value),)


def softcaps(model: "PreTrainedModel") -> Iterator[Candidate]:
    for cap in numbers(model):
        yield (partial(softcap, cap),)


def softcap(cap: float, logits: Tensor) -> Tensor:
    return cap * torch.tanh(logits / cap)


def numbers(model: "PreTrainedModel") -> list[float]:
    """Return numbers but 0 and 1 that the configuration holds or derives, and attributes of model and decoder."""
    config = model.config.get_text_config()
    derived = {name: getattr(config, name, None) for name, x in vars(type(config)).items() if isinstance(x, property)}
    places = [config.to_dict(), derived, vars(model), vars(decoder_of(model))]
    found = [value for place in places for value in place.values()]
    return sorted({float(v) for v in found if type(v) in (int, float) and v not in (0, 1)})


def apply(candidate: Candidate, x: Tensor) -> Tensor:
    (function,) = candidate
    return x if function is None else function(x.float())


def is_same(rebuilt: Tensor, own: Tensor) -> bool:
    """Return whether the tensors agree but for rounding."""
    return bool(relative_difference(rebuilt, own) <= tolerance(rounded_in(own)))


def relative_difference(other: Tensor, own: Tensor) -> Tensor:
    """Return the median over tokens of `token_differences`: in 16 bits, the choice of experts may flip for some."""
    return token_differences(other, own).median()


def token_differences(other: Tensor, own: Tensor) -> Tensor:
    """Return the largest difference of each token's values to the largest of its own ones."""
    size = own.float().abs().amax(-1).clamp(min=1e-12)
    return (other.float() - own.float()).abs().amax(-1) / size
