"""Bodies of requests to the server, in OpenAI's words."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lightning_peft.data.conversation import BadRow
from lightning_peft.data.tool_calls import CALL_ROLES, read_calls
from lightning_peft.data.turns import ROLES

MOST_STOPS = 16
"""Stop texts of a request: each is looked for at each token, in the thread that answers all requests."""


def whole_characters(text: str) -> str:
    """Return a text that has an encoding. Raises ValueError for half of a surrogate pair, which JSON allows."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at character {error.start} is no text") from None
    return text


def without_point(number: Any) -> Any:
    """Return 5 for 5.0: JSON has one kind of number, and some clients write all of them with a point."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def text_of_parts(content: Any) -> Any:
    """Return the text of a message's parts, which many clients write it in. Raises ValueError for parts of other kinds.

    Parts stand one after the other, a line each, as vLLM has them.
    """
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise ValueError(f"a part of type {kind} is not read here: parts are {{type: text, text: ...}}")
    return "\n".join(part["text"] for part in content)


def one_prompt(given: Any) -> Any:
    """Return the text, or the ids of tokens, that a list of one prompt holds. Raises ValueError for other lists."""
    prompt = given[0] if isinstance(given, list) and len(given) == 1 and not isinstance(given[0], int) else given
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(each) is int for each in prompt)):
        raise ValueError("one text is continued a request, given as it is or as the ids of its tokens")
    return prompt


def calls_in(given: Any) -> Any:
    """Return the calls of a turn as training reads them. Raises ValueError."""
    try:
        return read_calls({"tool_calls": given}, None, "assistant", "a turn", "tool_calls")
    except BadRow as error:
        raise ValueError(str(error).partition(": ")[2]) from error


def author(name: str) -> str:
    """Return system, user, assistant or tool for any name of one that training rows may give. Raises ValueError."""
    known = [name for name in ROLES if name not in CALL_ROLES]  # the text of others would be read as a call
    if name.lower() not in known:
        raise ValueError(f"{name!r} is no role; there are {', '.join(known)}")
    return ROLES[name.lower()]


Text = Annotated[str, AfterValidator(whole_characters)]
Whole = Annotated[int, BeforeValidator(without_point)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(without_point)]
Role = Annotated[str, AfterValidator(author)]
TurnCalls = Annotated[tuple[dict[str, Any], ...], BeforeValidator(calls_in)]


ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "frequency_penalty": (0,), "function_call": ("none",), "functions": ([],),
    "logit_bias": ({},), "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (),
    "presence_penalty": (0,), "reasoning_effort": (), "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"), "store": (False,), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "verbosity": (), "web_search_options": (),
}  # fmt: skip
"""OpenAI's keys that are not done here, and their values that change no answer: some clients send these unasked."""
LABELS = ("metadata", "prompt_cache_key", "safety_identifier")
"""OpenAI's keys that change no answer, whatever their value."""


class Body(BaseModel):
    """A request: a key that is not here is an error, never ignored, and so is a value of another type; null is none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(Body):
    """Options for what a stream says beside its pieces."""

    include_usage: bool = False


class Sampling(Body):
    """The keys that both kinds of completion take."""

    model: Text
    max_tokens: Whole | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: Seed | None = None
    stop: list[Text] = Field(default_factory=list, max_length=MOST_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Whole = Field(default=1, ge=1, le=1)
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def only_what_is_done(cls, given: Any) -> Any:
        """Leave out what asks for nothing, and name what is not done: ignored, it would be another answer."""
        if not isinstance(given, dict):
            return given
        left_out = {*LABELS, *(key for key, value in given.items() if value is None)}
        for key in given.keys() & ASKS_NOTHING.keys() - left_out - cls.model_fields.keys():
            if given[key] not in ASKS_NOTHING[key]:
                raise ValueError(f"{key} is not done here; leave it out")
            left_out.add(key)
        return {key: value for key, value in given.items() if key not in left_out}

    @field_validator("stop", mode="before")
    @classmethod
    def one_stop_is_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @model_validator(mode="after")
    def options_are_read(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is of a stream: it needs stream=true")
        return self


class Turn(Body):
    """A message of a chat."""

    role: Role
    content: Annotated[Text, BeforeValidator(text_of_parts)] = ""
    name: Text | None = None
    tool_calls: TurnCalls = ()
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, and this turn is of {self.role}")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: Field required")
        return self


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: Whole = Field(default=0, ge=0, le=20)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] = "auto"

    @model_validator(mode="after")
    def chat_options_are_read(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.tools and self.tool_choice != "none":
            raise ValueError("tools: calls of them come as text here; ask so by tool_choice=none")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ValueError(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} are one option: "
                "give one of them"
            )
        return self


class TextRequest(Sampling):
    """The body of /v1/completions."""

    prompt: Annotated[Text | list[Annotated[int, Field(ge=0)]], BeforeValidator(one_prompt)]
    echo: bool = False
    logprobs: Whole | None = Field(default=None, ge=0, le=5)


class LoadRequest(Body):
    """The body of the endpoints that load and unload an adapter."""

    lora_name: Text
    lora_path: Text | None = None
    load_inplace: bool = False
