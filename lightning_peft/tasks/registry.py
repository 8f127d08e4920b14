"""The tasks by name."""

from lightning_peft.tasks import cmudict, final_number
from lightning_peft.tasks.task import Task, score_nothing
from lightning_peft.tasks.text_to_sql.execution_accuracy import TASK as TEXT_TO_SQL

NONE = Task("none", score_nothing, headline=None, max_new_tokens=0)

TASKS = {task.name: task for task in (TEXT_TO_SQL, cmudict.TASK, final_number.TASK, NONE)}
"""Values of `data.task`; `data.source` takes those that bring rows."""
