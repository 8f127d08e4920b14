"""Samples with those that a teacher reads in their place, where it reads more (`data.teacher_prompt`)."""

from dataclasses import replace

from lightning_peft.data.audit import Audit
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.chat import Encoded, EncodedOrError, cut_to, refusal
from lightning_peft.data.conversation import BadRow


def with_twins(samples: list[Encoded], twins: EncodedOrError, origin: str) -> list[Encoded]:
    """Return the samples of a row, each with what a teacher reads in its place. Raises `BadRow`."""
    if isinstance(twins, Exception):
        raise refusal(twins, origin, "behind data.teacher_prompt: ") from twins
    trained = [[[label for label in one.labels if label != IGNORED_LABEL] for one in some] for some in (samples, twins)]
    if trained[0] != trained[1]:
        raise BadRow.because(
            origin,
            "expected the same tokens to train behind data.teacher_prompt, the chat template writes others there; use "
            "data.train_on_last_turn=true, or a teacher_prompt that ends in white space",
        )
    return [replace(sample, taught=twin) for sample, twin in zip(samples, twins, strict=True)]


def with_twin_cut(sample: Encoded, audit: Audit) -> Encoded:
    """Return a sample whose twin ends with the last token that is trained in both, as the sample may have been cut."""
    assert sample.taught is not None, "one of `with_twins`"
    count = len(sample.labels) - sample.labels.count(IGNORED_LABEL)
    places = [place for place, label in enumerate(sample.taught.labels) if label != IGNORED_LABEL]
    twin = cut_to(sample.taught, places[count - 1] + 1)
    audit.taught_tokens += len(twin.input_ids)
    return replace(sample, taught=twin)
