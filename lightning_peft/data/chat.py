"""Turn messages into tokens and labels, by the tokenizer's own chat template.

Labels are set on assistant turns only: from the end of the generation prompt through the turn's end tokens. A text is
tokenised once, as a whole; `rendering` says which texts a conversation becomes and where its turns are.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.config import DataConfig, Layout
from lightning_peft.data.conversation import TEXT_ROLE, BadRow, Message, tools_of
from lightning_peft.data.preferences import Standing
from lightning_peft.data.rendering import ConversationRenderer, Rendered, Rules, Span, TokenKind
from lightning_peft.data.template import ChatTemplate, ChatTemplateError
from lightning_peft.data.tokenizer_template import template_of


@dataclass
class Encoded:
    """A sample: token ids and labels of equal length, the label the token itself where it is trained, else -100."""

    input_ids: list[int]
    labels: list[int]
    ends: bool
    """The last token trained is an end token: generation learns to stop."""
    truncated: bool = False
    """Trained tokens were cut off at `data.max_length`."""
    kinds: bytes | None = field(default=None, compare=False)
    """A `TokenKind` for each token, none where it is not trained."""
    weights: list[float] | None = None
    """Factor of each token's loss; None where all are 1."""
    standing: Standing | None = None
    """The part of the sample in a preference objective."""
    taught: "Encoded | None" = field(default=None, compare=False)
    """The sample that a teacher reads in place of this one, with the same tokens trained."""
    top: "tuple[NDArray[np.int32], NDArray[np.float32], int] | None" = field(default=None, compare=False)
    """The kept part of a teacher's output at the trained tokens: the value of `KeptTeacher.of`."""
    margin: float | None = None
    """The lead that a chosen answer is to have; None where its row gives none."""
    origin: str = field(default="", compare=False)
    """The place of its row, as in rows.jsonl line 3; empty where nobody says it."""


log = logging.getLogger(__name__)

T = TypeVar("T")
EncodedOrError = list[Encoded] | Exception
"""The samples of a conversation, or what is wrong with it."""


def refusal(error: Exception, origin: str, where: str = "") -> BadRow:
    """Return the error of an outcome as one about its row: an error of template or tokenizer becomes a sentence."""
    return BadRow.because(origin, where + _reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError) or "TextEncodeInput" in str(error) or "surrogates" in str(error):
        return "expected UTF-8 text, got half of a surrogate pair or bytes of another encoding"
    if isinstance(error, RecursionError):
        return "expected a conversation that the chat template can render, got one nested too deeply"
    return str(error).strip().split("\n")[0] or type(error).__name__


def rules_of(config: DataConfig) -> Rules:
    """Return the rules by which the parts of a conversation are trained under the options."""
    kinds = frozenset(TokenKind[part.value] for part in config.train_on) | {TokenKind.end}
    return Rules(kinds, config.train_on_last_turn, config.reasoning)


class Encoder:
    """Turns conversations of any format into samples, and beginnings of conversations into prompts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rules: Rules | None = None,
        layout: Layout = Layout.chat,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._rules = rules or Rules()
        self._layout = layout
        self._template_options = template_options
        self._chat: ConversationRenderer | None = None
        self._labeller = _Labeller(tokenizer, self._rules.train_on)

    @property
    def template(self) -> ChatTemplate:
        """Return the chat template that conversations are laid out by. Raises `ChatTemplateError`."""
        return template_of(self._tokenizer, self._template_options)

    @property
    def renderer(self) -> ConversationRenderer:
        """Return the renderer. Raises `ChatTemplateError`, ValueError for a tokenizer without offsets."""
        if self._chat is None:
            if not self._tokenizer.is_fast:
                raise ValueError(f"{type(self._tokenizer).__name__} gives no character offsets; a fast one is needed")
            special = special_tokens(self._tokenizer)
            added = [str(token) for token in self._tokenizer.added_tokens_decoder.values()]
            self._chat = ConversationRenderer(self.template, special, added, self._rules)
        return self._chat

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[EncodedOrError]:
        """Return the samples of each conversation, or the error that it raises; all together is faster than one by one.

        Raises `ChatTemplateError` where the chat template can take no conversation at all.
        """
        outcomes: dict[int, EncodedOrError] = {}
        rendered: dict[int, list[Rendered]] = {}
        texts: dict[int, str] = {}
        renderer: ConversationRenderer | None = None
        for index, messages in enumerate(conversations):
            if messages[0].role == TEXT_ROLE:
                texts[index] = messages[0].content
                continue
            if self._layout is Layout.chat and renderer is None:
                renderer = self.renderer
            try:
                whole = [raw_text(messages, self._tokenizer)] if renderer is None else renderer(messages)
            except (ValueError, TypeError, RecursionError) as error:
                outcomes[index] = error
            else:
                rendered[index] = whole
        outcomes |= _together(rendered, partial(self._labeller.label, adds_special_tokens=self._layout is Layout.raw))
        outcomes |= _together(texts, self._labeller.whole)
        return [outcomes[index] for index in range(len(conversations))]

    def prompt(self, messages: Sequence[Message], check: Callable[[str], None] | None = None) -> list[int]:
        """Return the tokens to generate the next assistant turn from: exactly those before that turn in training.

        check: is given the text before its tokens are counted, and may raise. Raises `ChatTemplateError`, and
        ValueError for a value that is no text.
        """
        try:
            return self._prompt(messages, check)
        except (TypeError, UnicodeError, RecursionError) as error:  # the tokenizer's, for half of a surrogate pair
            raise ValueError(_reason(error)) from error

    def _prompt(self, messages: Sequence[Message], check: Callable[[str], None] | None) -> list[int]:
        if messages[0].role == TEXT_ROLE or self._layout is Layout.raw:
            text = "".join(message.content for message in messages)
            if check is not None:
                check(text)
            return _text_ids(self._tokenizer(text, verbose=False)["input_ids"], self._tokenizer)
        rendered = self.renderer.prompt(messages)
        if check is not None:
            check(rendered.text)
        [[prompt]] = self._labeller.label([[rendered]])
        return prompt.input_ids

    def end_token_ids(self) -> set[int]:
        """Return the tokens at which generation stops: EOS, and those that end an answer, or a call, in training."""
        ends: set[int] = {self._tokenizer.eos_token_id} - {None}
        if self._layout is Layout.raw:
            return ends
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
        for calls in ((), (call, call), (call,)):  # two, as the end of one call of several does not end the turn
            answer = Message("assistant", "" if calls else "b", tool_calls=calls)
            [outcome] = self.encode([[Message("user", "a"), answer]])
            if isinstance(outcome, Exception):
                if not calls:
                    raise outcome
                continue
            if outcome[-1].ends:
                ends.add([label for label in outcome[-1].labels if label != IGNORED_LABEL][-1])
            if calls:
                break
        return ends


def _together(given: Mapping[int, T], work: Callable[[list[T]], Sequence[EncodedOrError]]) -> dict[int, EncodedOrError]:
    """Return what `work` makes of all that is given at once, or of one after the other where one makes it fail."""
    try:
        return dict(zip(given, work(list(given.values())), strict=True)) if given else {}
    except Exception as error:  # the tokenizer raises what it likes, from Rust too
        if len(given) == 1:
            return {index: error for index in given}
    return {index: outcome for one, value in given.items() for index, outcome in _together({one: value}, work).items()}


def encoder_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Return the encoder under the options."""
    return Encoder(tokenizer, rules_of(config), config.layout, config.template_options)


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Return the sample, or the last of several, of a conversation or plain text. Raises `ChatTemplateError`."""
    return encode_all([messages], tokenizer)[0][-1]


def encode_all(
    conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, rules: Rules | None = None
) -> list[list[Encoded]]:
    """Return the samples of several conversations. Raises `ChatTemplateError`, or another error of a conversation."""
    samples = []
    for outcome in Encoder(tokenizer, rules).encode(conversations):
        if isinstance(outcome, Exception):
            raise outcome
        samples.append(outcome)
    return samples


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens to generate the next assistant turn from: exactly those before that turn in training."""
    return Encoder(tokenizer).prompt(messages)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which generation stops: EOS, and those that end an answer or a call in the chat template.

    EOS stands alone where the template can take no conversation, as text can be generated without a template.
    """
    try:
        return Encoder(tokenizer).end_token_ids()
    except ChatTemplateError as error:
        log.warning("%s; generation stops at EOS only", error)
        return {tokenizer.eos_token_id} - {None}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens as text; BOS is among them only where it is EOS as well."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    if tokenizer.bos_token != tokenizer.eos_token:
        special -= {tokenizer.bos_token}
    return sorted(special)


def raw_text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Return prompt and completion as they stand, with EOS where the completion does not end so. Raises ValueError."""
    if [message.role for message in messages] != ["user", "assistant"]:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(f"data.layout=raw: takes prompt/completion or text rows, not a conversation of {roles}")
    for what, is_there in {
        "tools": tools_of(messages),
        "a thought": messages[1].reasoning,
        "tool calls": messages[1].tool_calls,
        "a name": any(message.name is not None for message in messages),
    }.items():
        if is_there:
            raise ValueError(f"data.layout=raw: writes prompt and answer as they stand, and this row has {what} beside")
    prompt, answer = messages[0].content, messages[1].content
    end = "" if tokenizer.eos_token is None or answer.endswith(tokenizer.eos_token) else tokenizer.eos_token
    text, start = prompt + answer + end, len(prompt)
    if tokenizer.eos_token is None:
        return Rendered(text, (Span(start, ((len(text), TokenKind.answer),), messages[1].weight),))
    stop = len(text) - len(tokenizer.eos_token)
    return Rendered(text, (Span(start, ((stop, TokenKind.answer), (len(text), TokenKind.end)), messages[1].weight),))


def _text_ids(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of plain text as the tokenizer begins it, without the end token that some add themselves."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


class _Ends(Sequence[int]):
    """The places where the tokens of a text end in it, 0 for those the tokenizer adds, looked up one by one.

    A search asks for a few of them, and to list them all takes longer than to tokenise the text.
    """

    def __init__(self, encoding: Any) -> None:
        self._chars_of = encoding.token_to_chars
        self._length = len(encoding)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self._length:
            raise IndexError(place)
        chars = self._chars_of(place)
        return 0 if chars is None else chars[1]


class _Labeller:
    """Tokenises rendered texts as a whole, except where that would change the tokens of a prompt.

    With "assistant: " as the end of the prompt, " Paris" is one token in the whole text, but generation starts from
    the token " "; a prompt that ends in two newlines may get one token for them or two. There the text is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: frozenset[TokenKind]) -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._special = {
            token: len(str(added)) for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }
        self._alone: dict[str, list[int]] = {}

    def label(self, rendered: Sequence[Sequence[Rendered]], adds_special_tokens: bool = False) -> list[list[Encoded]]:
        """Return the samples of each conversation: one of each text."""
        tokenized = iter(self._tokenize([one.text for texts in rendered for one in texts], adds_special_tokens))
        return [[self._label(one, *next(tokenized), adds_special_tokens) for one in texts] for texts in rendered]

    def whole(self, texts: Sequence[str]) -> list[list[Encoded]]:
        """Return the sample of each plain text, trained as a whole and closed with EOS."""
        end = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        last = bytes((TokenKind.end,)) * len(end)
        found = []
        for ids in self._tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]:
            ids = _text_ids(ids, self._tokenizer) + end
            kinds = b"\0" + bytes((TokenKind.answer,)) * (len(ids) - 1 - len(end)) + last
            found.append([Encoded(ids, [IGNORED_LABEL, *ids[1:]], ends=bool(end), kinds=kinds[: len(ids)])])
        return found

    def _tokenize(self, texts: list[str], adds: bool = False) -> list[tuple[list[int], Sequence[int]]]:
        """Return the ids, and for each the character at which it ends. The character at which a token begins is not
        used, as some tokenizers trim it.
        """
        # `verbose=False`, as a warning of rows longer than the context is the task of data.on_too_long.
        found = self._tokenizer(texts, add_special_tokens=adds, return_attention_mask=False, verbose=False)
        if found.encodings is None:
            raise ValueError(f"{type(self._tokenizer).__name__} gives no character offsets; a fast one is needed")
        ends: list[Sequence[int]] = [list(some) if adds else some for some in map(_Ends, found.encodings)]
        return list(zip(found["input_ids"], ends, strict=True))

    def _label(self, rendered: Rendered, ids: list[int], ends: Sequence[int], adds: bool) -> Encoded:
        text = rendered.text
        if adds and ids and ends[-1] == 0:  # an end token of the tokenizer's own
            ids, ends = ids[:-1], ends[:-1]
        done: list[int] = []
        done_ends: list[int] = []
        placed: list[tuple[Span, int]] = []
        cut = 0
        for span in rendered.spans:
            first = bisect_right(ends, span.start - cut)
            special = next((i for i in range(first - 1, -1, -1) if ids[i] in self._special), -1)
            # Text after a special token is tokenised on its own, and is the same in every row, mostly "assistant".
            since_special = text[cut + ends[special] if special >= 0 else cut : span.start]
            if ids[special + 1 : first] != self._ids_alone(since_special):
                [(prompt, prompt_ends)] = self._tokenize([text[cut : span.start]], adds and not cut)
                if ids[: len(prompt)] == prompt:
                    first = len(prompt)
                else:
                    done, done_ends = done + prompt, [*done_ends, *(end + cut for end in prompt_ends)]
                    cut, first = span.start, 0
                    [(ids, ends)] = self._tokenize([text[cut:]])
            placed.append((span, len(done) + first))
        if done:
            ids, ends = done + ids, [*done_ends, *(end + cut for end in ends)]
        return self._sample(ids, ends, placed, len(text))

    def _sample(self, ids: list[int], ends: Sequence[int], spans: Sequence[tuple[Span, int]], length: int) -> Encoded:
        labels = [IGNORED_LABEL] * len(ids)
        kinds = bytearray(len(ids))
        weights = [1.0] * len(ids) if any(span.weight != 1 for span, _ in spans) else None
        last_kind = TokenKind.none
        for span, first in spans:
            if span.weight == 0:
                continue
            for stop, kind in span.parts:
                last = self._tokens_to(stop, ids, ends) if stop < length else len(ids)
                if kind in self._train_on and last > first:
                    labels[first:last] = ids[first:last]
                    kinds[first:last] = bytes((kind,)) * (last - first)
                    if weights is not None:
                        weights[first:last] = [span.weight] * (last - first)
                    last_kind = kind
                first = max(first, last)
        if labels:
            labels[0], kinds[0] = IGNORED_LABEL, 0
        return Encoded(ids, labels, ends=last_kind is TokenKind.end, kinds=bytes(kinds), weights=weights)

    def _tokens_to(self, stop: int, ids: list[int], ends: Sequence[int]) -> int:
        """Return the number of tokens up to a character, one across it included."""
        place = min(bisect_left(ends, stop), len(ends) - 1)
        if ids[place] in self._special and ends[place] - self._special[ids[place]] >= stop:
            return place  # the token before ends early, as its normaliser joins a letter and an accent
        return bisect_right(ends, ends[place])

    def _ids_alone(self, text: str) -> list[int]:
        if text not in self._alone:
            self._alone[text] = self._tokenize([text])[0][0] if text else []
        return self._alone[text]


def cut_to(sample: Encoded, limit: int) -> Encoded:
    """Return the first `limit` tokens of a sample."""
    labels = sample.labels[:limit]
    truncated = any(label != IGNORED_LABEL for label in sample.labels[limit:])
    return replace(
        sample,
        input_ids=sample.input_ids[:limit],
        labels=labels,
        ends=sample.ends and not truncated,
        truncated=truncated,
        kinds=None if sample.kinds is None else sample.kinds[:limit],
        weights=None if sample.weights is None else sample.weights[:limit],
    )
