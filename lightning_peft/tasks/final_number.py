"""`data.task=final_number`: worked answers that end in a number, as gsm8k's."""

import re
from decimal import Decimal

from lightning_peft.tasks.task import Task, TaskRow, share

# A minus sign belongs to the number unless it stands between two, as in 5-3.
NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """Return the number after the first `####`, else the last number in the text; None if there is none.

    `$1,234.50` is 1234.5.
    """
    _, mark, after = text.partition("####")
    numbers = NUMBER.findall(after if mark else text)
    if not numbers:
        return None
    return Decimal(re.sub("[$,]", "", numbers[0] if mark else numbers[-1]))


def final_number_match(answer: str, gold: str) -> bool:
    """Return whether the final numbers are equal, however they are written."""
    number = final_number(answer)
    return number is not None and number == final_number(gold)


def score_final_number(rows: list[TaskRow], answers: list[str]) -> dict[str, float]:
    """Return `final_number_accuracy`: the number after `####`, or the last one where an answer has no `####`."""
    hits = [final_number_match(answer, row["completion"]) for row, answer in zip(rows, answers, strict=True)]
    return {"final_number_accuracy": share(hits)}


TASK = Task(
    "final_number", score_final_number, headline="final_number_accuracy", max_new_tokens=256, is_mean_of_rows=True
)
