"""The treatment of samples over `data.max_length`."""

from dataclasses import replace

from lightning_peft.data.audit import Audit
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.chat import Encoded, cut_to
from lightning_peft.data.config import DataConfig, OnTooLong
from lightning_peft.data.token_store import kinds_of


def fits(sample: Encoded, config: DataConfig) -> bool:
    """Return whether a sample has at most `data.max_length` tokens."""
    return len(sample.input_ids) <= config.max_length


def shortened(sample: Encoded, origin: str, config: DataConfig, audit: Audit) -> list[Encoded]:
    """Return the pieces that `data.on_too_long` leaves of a sample that does not fit; each of them fits."""
    return TOO_LONG[config.on_too_long](sample, origin, config.max_length, audit)


def _truncate(sample: Encoded, origin: str, limit: int, audit: Audit) -> list[Encoded]:
    kinds = kinds_of(sample)
    audit.lost += len(kinds) - limit - kinds[limit:].count(0)
    return [cut_to(sample, limit)]


def _split(sample: Encoded, origin: str, limit: int, audit: Audit) -> list[Encoded]:
    audit.split_long += 1
    kinds = kinds_of(sample)
    # Pieces overlap by one token: the first of a piece is not predicted, so each token is trained once all the same.
    pieces = [
        Encoded(
            sample.input_ids[start : start + limit],
            [IGNORED_LABEL, *sample.labels[start + 1 : start + limit]],
            ends=False,
            kinds=b"\0" + kinds[start + 1 : start + limit],
            weights=None if sample.weights is None else sample.weights[start : start + limit],
        )
        for start in range(0, len(sample.input_ids) - 1, limit - 1)
    ]
    return [*pieces[:-1], replace(pieces[-1], ends=sample.ends)]


def _skip(sample: Encoded, origin: str, limit: int, audit: Audit) -> list[Encoded]:
    audit.skipped_long += 1
    return []


def _stop(sample: Encoded, origin: str, limit: int, audit: Audit) -> list[Encoded]:
    raise ValueError(
        f"{origin}: {len(sample.input_ids)} tokens, more than data.max_length={limit}; "
        "raise it, or choose data.on_too_long=truncate or skip"
    )


TOO_LONG = {OnTooLong.truncate: _truncate, OnTooLong.split: _split, OnTooLong.skip: _skip, OnTooLong.error: _stop}
