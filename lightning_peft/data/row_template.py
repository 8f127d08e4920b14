"""Templates of one's own, `data.prompt_template` and `data.teacher_prompt`, filled with the columns of a row."""

from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_peft.data.conversation import BadRow, Row


@lru_cache
def _row_template(source: str) -> Any:
    strict = {"undefined": StrictUndefined, "finalize": _written}
    return ImmutableSandboxedEnvironment(keep_trailing_newline=True, **strict).from_string(source)


def _written(value: Any) -> Any:
    """Return a value as a prompt has it. Raises ValueError for nothing, which would become the word None or nan."""
    if value is None or value != value:
        raise ValueError("a column is empty; {{ column or '' }} writes nothing then")
    return value


@lru_cache
def template_columns(source: str, option: str = "prompt_template") -> set[str]:
    """Return the columns that a template of `data` names. Raises ValueError for text that is no Jinja template."""
    try:
        return meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(source))
    except TemplateSyntaxError as error:
        raise ValueError(f"data.{option}={source!r}: not a Jinja template ({error})") from error


def filled(source: str, row: Row, option: str = "prompt_template") -> str:
    """Return what a template of `data` makes of a row. Raises `BadRow`."""
    try:
        prompt = _row_template(source).render(row.values)
    except UndefinedError as error:
        hint = "{{ column | default('') }} takes rows without one"
        raise BadRow.because(row.origin, f"data.{option} cannot be filled in ({error}; {hint})") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise BadRow.because(row.origin, f"data.{option} cannot be filled in ({error})") from error
    if not prompt.strip():
        raise BadRow(row.origin, f"text from data.{option}", prompt)
    return prompt
