"""The tables that take rows from outside the package."""

from lightning_peft.adapters.initialization import INITS, Initialization
from lightning_peft.adapters.method import Method
from lightning_peft.adapters.registry import METHODS
from lightning_peft.data.formats import FORMATS, RowFormat
from lightning_peft.data.sources import SOURCES, Source
from lightning_peft.objectives.objective import Objective
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerChoice
from lightning_peft.plugins import Table
from lightning_peft.tasks.registry import TASKS
from lightning_peft.tasks.task import Task

TABLES = (
    Table("METHODS", METHODS, Method),
    Table("INITS", INITS, Initialization),
    Table("TASKS", TASKS, Task),
    Table("FORMATS", FORMATS, RowFormat),
    Table("SOURCES", SOURCES, Source),
    Table("OBJECTIVES", OBJECTIVES, Objective),
    Table("OPTIMIZERS", OPTIMIZERS, OptimizerChoice),
)
