"""A row format of one's own: problems with the steps to their answer.

    lightning-peft train imports=[own_rows] data=worked.jsonl model=tiny run_dir=runs/worked

Run it where this file and the rows lie, or with its folder on PYTHONPATH. Rows with these three columns are found by
themselves; `data.format=worked` asks for them by name.
"""

from lightning_peft.data.conversation import BadRow, Message, Row
from lightning_peft.data.formats import FORMATS, RowFormat, Shape, text_of


def read_worked(row: Row, shape: Shape) -> list[Message]:
    """Return the problem as a question, and the steps, a line each, before the answer."""
    steps = row.values["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise BadRow(row.origin, "a list of texts", steps, "steps")
    answer = "\n".join([*steps, f"Answer: {text_of(row, 'solution')}"])
    return [Message("user", text_of(row, "problem")), Message("assistant", answer)]


FORMATS["worked"] = RowFormat((("problem", "steps", "solution"),), (), read_worked, side=("system",))
