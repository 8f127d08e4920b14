"""The errors that speak to the user, and their form: one line, and the exit status for wrong input."""

import traceback
from pathlib import Path

import lightning_peft
from lightning_peft.cluster.job import ClusterError
from lightning_peft.plugins import is_of_plugin


class WrongInput(ValueError):
    """A trial's error that speaks to the user; on its way out of another process it loses its traceback."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, of a failed file operation with the file first and without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{files}: {error.strerror.lower()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split())


def is_symlink_loop(error: BaseException) -> bool:
    """Return whether a path leads through links into itself, which Path.resolve tells so before Python 3.13."""
    return isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from ")


def is_input_error(error: BaseException) -> bool:
    """Return whether an error speaks to the user: a failed file operation, a cluster's refusal, or our own ValueError.

    A ValueError out of a library is a defect, to be seen with its traceback and another exit status.
    """
    if isinstance(error, OSError | WrongInput | ClusterError):
        return True
    if is_symlink_loop(error):
        return True
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    is_own = Path(innermost).is_relative_to(Path(lightning_peft.__file__).parent) or is_of_plugin(innermost)
    return isinstance(error, ValueError) and is_own
