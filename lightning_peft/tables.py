"""The tables that take rows from outside the package."""

from lightning_peft.adapters.initialization import INITS, Initialization
from lightning_peft.adapters.method import Method
from lightning_peft.adapters.registry import METHODS
from lightning_peft.data.formats import FORMATS, RowFormat
from lightning_peft.data.sources import SOURCES, Source
from lightning_peft.objectives.objective import Objective
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerChoice
from lightning_peft.plugins import OpenTable
from lightning_peft.tasks.registry import TASKS
from lightning_peft.tasks.task import Task

TABLES = (
    OpenTable("METHODS", METHODS, Method),
    OpenTable("INITS", INITS, Initialization),
    OpenTable("TASKS", TASKS, Task),
    OpenTable("FORMATS", FORMATS, RowFormat),
    OpenTable("SOURCES", SOURCES, Source),
    OpenTable("OBJECTIVES", OBJECTIVES, Objective),
    OpenTable("OPTIMIZERS", OPTIMIZERS, OptimizerChoice),
)
