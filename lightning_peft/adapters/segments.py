"""Adapters of several models around one frozen base: each has its own rows of a batch, the base's product is shared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.kernels.frozen_linear import given
from lightning_peft.kernels.segments import RandomState, Segment, add_segments
from lightning_peft.quantization.frozen_base import frozen_base

PASS_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of several models that go through the base at once, by the type of the device; a model's own are never parted.
A pass keeps memory for each of them, and of so many the products are near their full speed: twice as many would save a
tenth of the time of a model of 135M on a CPU. Ours."""


def most_in_pass(device_type: str) -> int:
    """Return the most tokens of a pass that takes several models."""
    return PASS_TOKENS.get(device_type, PASS_TOKENS["cuda"])


def most_tokens(own: int, models: int, device_type: str) -> int:
    """Return the most tokens of a pass that `in_passes` makes of so many models, each of which has up to `own`.

    A pass of that many may take all models.
    """
    return min(models * own, max(most_in_pass(device_type), own))


def in_passes(tokens: Sequence[int], device_type: str) -> list[slice]:
    """Return the runs of models, whose numbers of tokens these are, that go through the base at once."""
    most, starts, taken = most_in_pass(device_type), [0], 0
    for place, own in enumerate(tokens):
        if place > starts[-1] and taken + own > most:
            starts.append(place)
            taken = 0
        taken += own
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True) if stop > start]


def change_of_base(config: AdapterConfig) -> str:
    """Return what adapters of this config do to a base that others would see, as in "trains biases of the base"; empty
    where they leave it as it is."""
    if reason := METHODS[config.method].cannot_share_base:
        return reason
    if config.trainable_modules:
        return f"trains {config.trainable_modules} of the base"
    if config.trained_biases is not Bias.none:
        return "trains biases of the base"
    if config.initialization.rewrites_base:
        return f"starts by rewriting the base (adapter.init={config.init_name})"
    return ""


@dataclass
class Share:
    """The rows of a batch that go through one model's adapters, and the random numbers that these drop by."""

    start: int
    stop: int
    random: Tensor
    """State of the device's generator where the model's own forward would begin."""


@dataclass
class BatchShares:
    """The models whose rows a batch holds. A backward pass comes before the next `begin`."""

    shares: Mapping[int, Share] = field(default_factory=dict)
    """Shares by the model's number, in the order of rows, without gaps."""
    random: dict[int, RandomState] = field(default_factory=dict)
    number: int = 0

    def begin(self, shares: Mapping[int, Share]) -> None:
        """Take the next batch."""
        self.shares = shares
        self.random = {number: RandomState(share.random) for number, share in shares.items()}
        self.number += 1

    @property
    def rows(self) -> int:
        return max((share.stop for share in self.shares.values()), default=0)

    def forget(self, number: int) -> None:
        """Let go of what is kept of a model that has no rows any more."""
        self.random.pop(number, None)


class SegmentedLinear(nn.Module):
    """A frozen layer and the adapters that several models have around it, each on its rows of the present batch.

    The adapters are the models' own layers, and no modules of this one. A model without one has the base's output.
    """

    def __init__(self, base_layer: nn.Module, name: str, batching: BatchShares):
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.batching = batching
        self.adapters: dict[int, Adapter] = {}
        self.drawn: tuple[int, dict[int, Tensor]] = (0, {})
        """Number of a batch, and the state of each model's random numbers in that batch when they were drawn here."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features), rows as `batching` has them."""
        shares = self.batching.shares
        if (rows := x.numel() // x.shape[-1]) != self.batching.rows:
            raise ValueError(
                f"sweep.together: {self.name} is fed {rows} rows of a batch of {self.batching.rows} tokens, so nobody "
                "knows whose they are; leave it out of adapter.target_modules, or train the trials apart"
            )
        present = {number: adapter for number, adapter in self.adapters.items() if number in shares}
        if not present:
            return self.base_layer(x)
        base = frozen_base(self.base_layer, x) or given(self.base_layer(x))
        segments, factors = [], []
        for number, adapter in present.items():
            product = adapter.product()
            assert product is not None, "segment_layers takes no other adapters"
            random = self.random(number) if adapter.active_dropout else None
            share = shares[number]
            segments.append(Segment(share.start, share.stop, adapter.scaling, adapter.active_dropout, random))
            factors.append(product)
        return add_segments(base, x, segments, factors)

    def forget(self, number: int) -> None:
        """Let go of a model's adapter: it has no rows any more."""
        self.adapters.pop(number, None)
        self.drawn[1].pop(number, None)

    def random(self, number: int) -> RandomState:
        """Return the state that a model draws random numbers from; the same again where a block runs a second time."""
        batch, states = self.drawn
        if batch != self.batching.number:
            self.drawn = batch, states = self.batching.number, {}
        if number in states:
            return RandomState(states[number])
        states[number] = self.batching.random[number].state
        return self.batching.random[number]


def segment_layers(model: nn.Module, batching: BatchShares, models: Mapping[int, nn.Module]) -> None:
    """Put the adapters of `models`, by number, around the layers of `model`, which are of the same base.

    Raises ValueError for an adapter whose output is not the base's and a low-rank product.
    """
    for number, adapted in models.items():
        for name, adapter in adapters(adapted):
            if not adapter.is_product():
                raise ValueError(f"{name}: {type(adapter).__name__} is no low-rank product beside its base")
            layer = model.get_submodule(name)
            if not isinstance(layer, SegmentedLinear):
                layer = SegmentedLinear(layer, name, batching)
                model.set_submodule(name, layer)
            layer.adapters[number] = adapter
