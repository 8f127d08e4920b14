"""The reader that fits the columns of rows, by their names and the options."""

from collections.abc import Collection, Iterable

from lightning_peft.data.config import DataConfig, Format, Layout, RowKind
from lightning_peft.data.conversation import shown
from lightning_peft.data.formats import (
    FORMATS,
    SIDE_COLUMNS,
    USUAL_NAMES,
    WITHOUT_TURNS,
    RowFormat,
    RowReader,
    check_format,
)
from lightning_peft.data.row_template import template_columns
from lightning_peft.tasks.registry import TASKS


def _alternatives(row_format: RowFormat, config: DataConfig) -> list[tuple[str, ...]]:
    named = [getattr(config, option) for option in row_format.options]
    if not named:
        return list(row_format.usual_columns)
    return list(
        dict.fromkeys(
            tuple(name or usual for name, usual in zip(named, columns, strict=True))
            for columns in row_format.usual_columns
        )
    )


def row_reader(columns: Collection[str], config: DataConfig) -> RowReader:
    """Return the reader for rows with these columns, by `data.format` and the column options, else by their names.

    Raises ValueError where an option names a column that is not there, or no format fits.
    """
    check_format(config.format)
    there = ", ".join(name if name.replace("_", "a").isalnum() else repr(name) for name in columns)
    kind = config.rows or RowKind.answers
    formats = {format: row_format for format, row_format in FORMATS.items() if row_format.rows is kind}
    _refuse_other_rows(columns, config, kind)
    renamed = {
        option: format
        for format, row_format in formats.items()
        for option in row_format.options
        if getattr(config, option) is not None
    }
    sides = dict.fromkeys(name for row_format in formats.values() for name in row_format.side)
    side_options = [f"{name}_column" for name in sides if getattr(config, f"{name}_column") is not None]
    side_options += ["margin_column"] if config.margin_column is not None else []
    for option in [*renamed, *side_options]:
        if (name := getattr(config, option)) not in columns:
            raise ValueError(f"data.{option}={name}: the rows have no such column, only {there}")
    wanted = {config.format} - {str(Format.auto)} | set(renamed.values())
    if config.prompt_template is not None:
        return _templated_reader(columns, config, wanted)
    if len(wanted) > 1:
        options = [f"data.{option}" for option in renamed]
        raise ValueError(
            f"data.format={config.format} and {', '.join(options)}: these belong to different formats "
            f"({', '.join(sorted(wanted))}); give those of one"
        )
    for format in wanted or formats:
        for candidate in (alternatives := _alternatives(FORMATS[format], config)):
            if all(name in columns for name in candidate):
                return _reader(format, candidate, columns, config)
    if wanted:
        needed = " or ".join(" and ".join(names) for names in alternatives)
        raise ValueError(f"data.format={format}: needs a column {needed}; the rows have {there}")
    if kind is RowKind.pairs:
        raise ValueError(
            f"data.format=auto: no pairs of answers, the columns are {there}; name them with data.chosen_column and "
            "data.rejected_column"
        )
    if kind is RowKind.labelled:
        raise ValueError(
            f"data.format=auto: no labelled answers, the columns are {there}; name them with data.prompt_column, "
            "data.completion_column and data.label_column"
        )
    raise ValueError(
        f"data.format=auto: no known shape of row, the columns are {there}; "
        "name two with data.prompt_column and data.completion_column, "
        f"or one with data.text_column or data.messages_column{_likely(columns)}"
    )


_PROMPTS = ("prompt", "question", "instruction", "input", "query", "problem")
_COMPLETIONS = ("completion", "answer", "response", "output", "solution", "chosen")
"""Names by which data sets call the two, the likeliest first."""


def _likely(columns: Collection[str]) -> str:
    """Return the options that name two columns as people call them; empty where there are none."""
    by_name = {name.strip().lower(): name for name in columns}
    prompt, answer = (next((by_name[n] for n in names if n in by_name), None) for names in (_PROMPTS, _COMPLETIONS))
    if prompt is None or answer is None or not f"{prompt}{answer}".isidentifier():
        return ""
    return f", as data.prompt_column={prompt} data.completion_column={answer}"


OBJECTIVES_OF = {
    RowKind.answers: "objective=sft (or distill)",
    RowKind.pairs: "objective=dpo (or ipo, simpo, orpo, reward)",
    RowKind.labelled: "objective=kto",
}
"""Words of the command line that train on each kind of rows."""


def _refuse_other_rows(columns: Collection[str], config: DataConfig, kind: RowKind) -> None:
    """Raise ValueError where rows, or options, are those of another kind than the objective takes."""
    if config.format != Format.auto and (asked := FORMATS[config.format].rows) is not kind:
        raise ValueError(
            f"data.format={config.format}: {OBJECTIVES_OF[kind]} takes {kind.name}, and {OBJECTIVES_OF[asked]} "
            f"trains on {config.format} rows"
        )
    read = {option for row_format in FORMATS.values() if row_format.rows is kind for option in row_format.options}
    read |= {f"{name}_column" for row_format in FORMATS.values() if row_format.rows is kind for name in row_format.side}
    for other, row_format in FORMATS.items():
        for option in row_format.options:
            if option not in read and getattr(config, option) is not None:
                raise ValueError(
                    f"data.{option}={getattr(config, option)}: names a column of {other} rows, which "
                    f"{OBJECTIVES_OF[row_format.rows]} trains on"
                )
    if config.margin_column is not None and kind is not RowKind.pairs:
        raise ValueError(f"data.margin_column={config.margin_column}: names a column of pairs, for objective=reward")
    named = {getattr(config, option) for option in read} | set(config.ignore_columns)
    fits = any(
        all(name in columns for name in names)
        for row_format in FORMATS.values()
        if row_format.rows is kind
        for names in _alternatives(row_format, config)
    )
    both = {"chosen", "rejected"} <= set(columns) and not {"chosen", "rejected"} & named
    if kind is not RowKind.pairs and both:
        raise ValueError(
            f"chosen and rejected answers: {OBJECTIVES_OF[RowKind.pairs]} trains on them; {OBJECTIVES_OF[kind]} takes "
            f"{kind.name}"
            + (
                ", as with data.completion_column=chosen data.ignore_columns=[rejected]"
                if kind is RowKind.answers
                else ""
            )
        )
    if fits or kind is RowKind.answers or config.prompt_template is not None:
        return
    for row_format in FORMATS.values():
        if row_format.rows is not kind and any(set(names) <= set(columns) for names in row_format.usual_columns):
            what = "pairs of chosen and rejected answers" if kind is RowKind.pairs else "answers with a label"
            raise ValueError(
                f"rows of {', '.join(columns)}: {OBJECTIVES_OF[kind]} takes {what}; these are for "
                f"{OBJECTIVES_OF[_kind_of(columns, kind)]}"
            )


def _kind_of(columns: Collection[str], wanted: RowKind) -> RowKind:
    """Return the most special kind, other than `wanted`, whose usual columns are there."""
    for kind in (RowKind.pairs, RowKind.labelled, RowKind.answers):
        alternatives = [names for row_format in FORMATS.values() if row_format.rows is kind
                        for names in row_format.usual_columns]  # fmt: skip
        if kind is not wanted and any(set(names) <= set(columns) for names in alternatives):
            return kind
    return RowKind.answers


def _templated_reader(columns: Collection[str], config: DataConfig, wanted: Iterable[str]) -> RowReader:
    """Return the reader of rows whose prompt is `data.prompt_template`, filled with their columns."""
    source = config.prompt_template or ""
    if config.rows is RowKind.pairs and config.prompt_column is None:
        answers = (config.chosen_column or "chosen", config.rejected_column or "rejected")
        missing = [name for name in (*sorted(template_columns(source)), *answers) if name not in columns]
        if missing:
            raise ValueError(f"data.prompt_template: the rows have no column {missing[0]}, only {', '.join(columns)}")
        return _reader(Format.preference, answers, columns, config)
    if config.rows is RowKind.labelled or set(wanted) - {Format.prompt_completion} or config.prompt_column is not None:
        raise ValueError(
            f"data.prompt_template={source!r}: makes the prompt of prompt/completion rows; give data.completion_column "
            "with it, and no other format or column of the prompt"
        )
    answer = config.completion_column or "completion"
    for name in sorted(template_columns(source)) + [answer]:
        if name not in columns:
            option = "completion_column" if name == answer else "prompt_template"
            raise ValueError(f"data.{option}: the rows have no column {name}, only {', '.join(columns)}")
    return _reader(Format.prompt_completion, (answer, answer), columns, config)


def _reader(format: str, names: tuple[str, ...], columns: Collection[str], config: DataConfig) -> RowReader:
    if len(set(names)) < len(names) and config.prompt_template is None:
        twice = next(name for name in names if names.count(name) > 1)
        options = " and ".join(f"data.{option}" for option in FORMATS[format].options)
        raise ValueError(f"{options}: name column {twice!r} for two of them; each has its own")
    side = {}
    for name in FORMATS[format].side:
        column = getattr(config, f"{name}_column") or USUAL_NAMES.get(name, name)
        templated = config.prompt_template is not None and column in template_columns(config.prompt_template)
        if column not in names and not templated and column not in config.ignore_columns:
            side[name] = column
    for name in dict.fromkeys((*FORMATS[format].side, *SIDE_COLUMNS)):
        if getattr(config, f"{name}_column") is not None and name not in side:
            value = getattr(config, f"{name}_column")
            raise ValueError(f"data.{name}_column={shown(value)}: rows of data.format={format} have none")
    read = {*names, *(template_columns(config.prompt_template) if config.prompt_template is not None else ())}
    if taken := [name for name in config.ignore_columns if name in read]:
        raise ValueError(
            f"data.ignore_columns: names {', '.join(taken)}, which rows of data.format={format} are made of"
        )
    if config.prompt_template is not None:
        side.pop("input", None)
        side.pop("prompt", None)
    if config.teacher_prompt is not None:
        if format in WITHOUT_TURNS:
            raise ValueError(f"data.teacher_prompt: stands before a prompt, and rows of data.format={format} have none")
        if missing := sorted(template_columns(config.teacher_prompt, "teacher_prompt") - set(columns)):
            raise ValueError(f"data.teacher_prompt: the rows have no column {missing[0]}, only {', '.join(columns)}")
    return RowReader(
        columns=names,
        side=side,
        prompt_template=config.prompt_template,
        format=format,
        system_prompt=config.system_prompt,
        ignored=frozenset(config.ignore_columns),
        scored=TASKS[config.task].columns if config.task in TASKS else (),
        margin=config.margin_column,
        teacher_prompt=config.teacher_prompt,
        is_raw=config.layout is Layout.raw,
        lists_unread=config.source in ("files", "hub"),
    )
