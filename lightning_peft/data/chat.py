"""From messages to tokens and labels, by the tokenizer's own chat template.

Labels are set on assistant turns only: from the end of the generation prompt through the turn's end token. The spans
come from rendering, not from `{% generation %}` marks in the template, which few templates have; a conversation
is tokenised once, as a whole.
"""

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.formats import TEXT_ROLE, Message

log = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message.content + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For tokenizers that bring no chat template."""

TEMPLATE_DATE = datetime(2024, 7, 26)
"""Today, for the templates that write it: one day for every start of a run, and for training and generation. It is the
one that Llama 3's templates fall back to."""

_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")

_MARK = "\ue000"  # private use: stands in for an assistant turn while its place in the rendering is looked for


class ChatTemplateError(ValueError):
    """A chat template from which trained and untrained parts cannot be told, or that refuses a conversation."""


@dataclass
class Encoded:
    """A sample: token ids and labels of equal length, the label the token itself where it is trained, else -100."""

    input_ids: list[int]
    labels: list[int]
    ends: bool
    """The last token trained is an end token: generation learns to stop."""
    truncated: bool = False
    """Its end was cut off at `data.max_length`."""


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """One conversation or plain text as a sample. Raises `ChatTemplateError`."""
    return encode_all([messages], tokenizer)[0]


def encode_all(conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Samples of several conversations of one format, tokenised together because that is faster."""
    if not conversations:
        return []
    if conversations[0][0].role == TEXT_ROLE:
        texts = [messages[0].content for messages in conversations]
        return [_encode_text(ids, tokenizer) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    return _Labeller(tokenizer).label(list(map(_Renderer(tokenizer), conversations)))


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens to generate the next assistant turn from: exactly those that stand before it in training."""
    if messages[0].role == TEXT_ROLE:
        return _text_ids(tokenizer(messages[0].content)["input_ids"], tokenizer)
    rendered = _Renderer(tokenizer, add_generation_prompt=True)(messages)
    return _Labeller(tokenizer).label([rendered])[0].input_ids


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens at which generation stops: EOS, and the end-of-turn token of the chat template where it is another."""
    sample = encode([Message("user", "a"), Message("assistant", "b")], tokenizer)
    ends = {tokenizer.eos_token_id} - {None}
    return ends | {[label for label in sample.labels if label != IGNORED_LABEL][-1]} if sample.ends else ends


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    """The conversation as text. Raises `ChatTemplateError` where the template refuses it."""
    log_layout(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=_template(tokenizer),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        assert isinstance(text, str)
        return text
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise ChatTemplateError(f"the chat template refuses a conversation of {roles}: {error}") from error


def log_layout(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say, once, where conversations are laid out without a template of the tokenizer, or with a date in them."""
    if not tokenizer.chat_template:
        _log_plain_layout(tokenizer.name_or_path)
    elif "strftime_now" in str(tokenizer.chat_template):
        _log_date(tokenizer.name_or_path)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return PLAIN_TEMPLATE
    template = tokenizer.get_chat_template()
    return _TODAY.sub(lambda call: repr(TEMPLATE_DATE.strftime(call["format"])), template)


@lru_cache
def _log_plain_layout(name: str) -> None:
    log.warning("The tokenizer %s has no chat template: using the plain layout 'User: ...', 'Assistant: ...'.", name)


@lru_cache
def _log_date(name: str) -> None:
    log.info("The chat template of %s writes today's date: it is always %s here.", name, TEMPLATE_DATE.date())


def _text_ids(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of plain text as the tokenizer begins it, without the end token that some add themselves."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _encode_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = _text_ids(ids, tokenizer) + end
    return Encoded(ids, [IGNORED_LABEL, *ids[1:]], ends=bool(end))


@dataclass(frozen=True)
class _Span:
    """An assistant turn in the rendered text: characters start to stop, and whether an end token closes it."""

    start: int
    stop: int
    ends: bool


class _Renderer:
    """Renders conversations and finds their assistant turns in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> None:
        self._tokenizer = tokenizer
        self._add_generation_prompt = add_generation_prompt
        self._end_token = _end_token_pattern(tokenizer)

    def __call__(self, messages: Sequence[Message]) -> tuple[str, list[_Span]]:
        text = render(messages, self._tokenizer, self._add_generation_prompt)
        return text, [self._span(text, messages, i) for i, turn in enumerate(messages) if turn.role == "assistant"]

    def _span(self, text: str, messages: Sequence[Message], turn: int) -> _Span:
        prompt = render(messages[:turn], self._tokenizer, add_generation_prompt=True)
        start, content = len(prompt), messages[turn].content
        # As most templates do it: the content as it is, then an end token. This saves a third of the rendering.
        if text.startswith(prompt) and text.startswith(content, start):
            if match := self._end_token.match(text, start + len(content)):
                return _Span(start, match.end(), True)
        before, after = self._around(text, messages, turn)
        if not before.startswith(prompt):
            raise ChatTemplateError(
                f"the chat template is not prefix-stable: the prompt before assistant message {turn + 1} ends "
                f"{prompt[-40:]!r} in generation and {before[-40:]!r} in training"
            )
        stop = len(text) - len(after)
        if match := self._end_token.match(after):
            return _Span(start, stop + match.end(), True)
        return _Span(start, stop + len(after) - len(after.lstrip()), False)

    def _around(self, text: str, messages: Sequence[Message], turn: int) -> tuple[str, str]:
        """What stands before and after the content of an assistant turn, by rendering it with another content."""
        marked = [*messages[:turn], Message("assistant", _MARK), *messages[turn + 1 :]]
        before, *after = render(marked, self._tokenizer, self._add_generation_prompt).split(_MARK)
        if len(after) != 1:
            raise ChatTemplateError(
                f"the chat template writes the content of assistant message {turn + 1} {len(after)} times, "
                "it must do so once"
            )
        if not (text.startswith(before) and text.endswith(after[0])):
            raise ChatTemplateError(
                f"the chat template changes its other parts with the content of assistant message {turn + 1}; "
                "what to train cannot be told"
            )
        return before, after[0]


def _end_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A special token, but not BOS, right after an assistant's content: white space may stand between."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    if tokenizer.bos_token != tokenizer.eos_token:
        special -= {tokenizer.bos_token}
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")


class _Labeller:
    """Tokenises rendered conversations as a whole, except where that would change the tokens of a prompt.

    With "assistant: " as the end of the prompt, " Paris" is one token in the whole text, but generation starts from
    the token " "; a prompt that ends in two newlines may get one token for them or two. There the text is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._alone: dict[str, list[int]] = {}

    def label(self, rendered: Sequence[tuple[str, list[_Span]]]) -> list[Encoded]:
        tokenized = self._tokenize([text for text, _ in rendered])
        return [
            self._label(text, spans, ids, ends) for (text, spans), (ids, ends) in zip(rendered, tokenized, strict=True)
        ]

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Ids, and for each the character at which it ends. Where it begins is not used: some tokenizers trim it."""
        # Not verbose: it would warn of rows longer than the context, which data.on_too_long is there for.
        tokenized = self._tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return [
            (ids, [end for _, end in offsets])
            for ids, offsets in zip(tokenized["input_ids"], tokenized["offset_mapping"], strict=True)
        ]

    def _label(self, text: str, spans: list[_Span], ids: list[int], ends: list[int]) -> Encoded:
        done: list[int] = []
        labels: list[int] = []
        cut = 0
        for span in spans:
            first = bisect_right(ends, span.start - cut)
            special = next((i for i in range(first - 1, -1, -1) if ids[i] in self._special), -1)
            # Text after a special token is tokenised on its own, and is the same in every row: "assistant" mostly.
            since_special = text[cut + ends[special] if special >= 0 else cut : span.start]
            if ids[special + 1 : first] != self._ids_alone(since_special):
                prompt = self._tokenize([text[cut : span.start]])[0][0]
                if ids[: len(prompt)] == prompt:
                    first = len(prompt)
                else:
                    done, cut, first = done + prompt, span.start, 0
                    [(ids, ends)] = self._tokenize([text[cut:]])
            last = bisect_right(ends, ends[min(bisect_left(ends, span.stop - cut), len(ends) - 1)])
            labels += [IGNORED_LABEL] * (len(done) + first - len(labels)) + ids[first:last]
        ids = done + ids
        labels += [IGNORED_LABEL] * (len(ids) - len(labels))
        return Encoded(ids, [IGNORED_LABEL, *labels[1:]], ends=bool(spans) and spans[-1].ends)

    def _ids_alone(self, text: str) -> list[int]:
        if text not in self._alone:
            self._alone[text] = self._tokenize([text])[0][0] if text else []
        return self._alone[text]
