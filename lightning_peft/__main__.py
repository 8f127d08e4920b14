"""The command line: `lightning-peft <command> [group=option] [key=value] ...`."""

import difflib
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning_peft
from lightning_peft.allocator import let_segments_grow
from lightning_peft.commands import COMMANDS
from lightning_peft.ctrl_c import INTERRUPTED, IS_COMMAND, end_at_ctrl_c, raise_at_ctrl_c
from lightning_peft.threads import set_up_threads
from lightning_peft.training.preemption import Preempted, nothing_to_lose
from lightning_peft.training.signal_watch import SIGNAL_WATCH


def usage() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightning-peft <command> [group=option] [key=value] ...",
            "       lightning-peft --version",
            "",
            *lines,
            "",
            "lightning-peft <command> --help lists the groups and options of a command.",
            "",
            "  lightning-peft train method=qlora rank=r16 hardware=gpu_24gb model=llama_3_1_8b data=alpaca",
            "  lightning-peft evaluate adapter_path=runs/demo",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its status: 0 done, 1 failed, 2 wrong input (said in a line on stderr), 130 interrupted.

    The status 75 of `train` says that the run was asked to leave and is to be resumed (`training/preemption.py`).
    """
    open_what_is_closed()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["help"]:
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"lightning-peft {lightning_peft.__version__}")
        return 0
    command, *overrides = arguments
    if command == "help" and overrides:
        command, overrides = overrides[0], [*overrides[1:], "--help"]
    if command not in COMMANDS:
        meant = meant_by(command)
        hint = f"; use lightning-peft {meant}" if meant is not None else ""
        print(f"error: {command}: no such command; choose one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return 2
    try:
        here = os.getcwd()
    except FileNotFoundError:
        print("error: the working folder is there no more; cd to one that is", file=sys.stderr)
        return 2
    if not sys.flags.safe_path and here not in sys.path:
        sys.path.insert(0, here)  # for callbacks of one's own: `python -m`, and so the ranks, have it
    module, function = COMMANDS[command][0].split(":")
    set_up_threads()
    let_segments_grow()
    if command == "demo":
        return run_demo(overrides)
    try:
        with ExitStack() as stack:
            if command == "train":
                stack.enter_context(nothing_to_lose())
                stack.enter_context(SIGNAL_WATCH.watching())
            # Slow imports happen only now, so that --help answers at once and a signal during them is no crash.
            with uncollected():
                from lightning_peft.command_line import run_command

            raise_at_ctrl_c()
            return run_command(command, lambda config: imported(module, function)(config), overrides)
    except Preempted as left:
        return left.exit_status
    except KeyboardInterrupt:  # while the command is imported
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        if IS_COMMAND:  # Python's own end is not to be seen either
            end_at_ctrl_c()


def imported(module: str, function: str) -> Callable[[Any], Any]:
    """Import the function of a command. Ctrl-C ends the process meanwhile: an import would make another error of it."""
    if IS_COMMAND:
        end_at_ctrl_c()
    with uncollected():
        found: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    raise_at_ctrl_c()
    return found


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without a look for garbage, now or later, among what modules hold: it took a quarter of the start.

    A process that imports the package for its own ends keeps its collector as it is.
    """
    if not IS_COMMAND:
        yield
        return
    if gc.get_freeze_count():
        gc.collect()  # what another command in this process has left is not to be kept
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def open_what_is_closed() -> None:
    """Put the null device where stdin, stdout or stderr is closed.

    The next file that is opened would take its number, and with that all that libraries and children print. `sys.stdin`
    stays None, so that a chat can say why it has nobody to talk to.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so the one that is closed
            os.set_inheritable(null, True)
            if name != "stdin":
                setattr(sys, name, os.fdopen(null, "w"))


def meant_by(word: str) -> str | None:
    """Return the command that is meant by another tool's, a mistyped one, or a first word that is an option."""
    from lightning_peft.other_tools import BY_THEIR_COMMAND

    if word in BY_THEIR_COMMAND:
        return BY_THEIR_COMMAND[word]
    if "=" in word or word.endswith((".yaml", ".yml")):
        return f"train {word}"
    return next(iter(difflib.get_close_matches(word.lower(), COMMANDS, n=1)), None)


def run_demo(words: list[str]) -> int:
    from lightning_peft.commands.demo import demo

    if any(word in ("-h", "--help") for word in words):
        print(
            "usage: lightning-peft demo [words of train]\n\n"
            "Runs train recipe=lora/text_to_sql, then evaluate, in runs/demo or run_dir=DIR. A demo that was stopped\n"
            "goes on where it was. The model's package is fetched where it is missing."
        )
        return 0
    return demo(words, main)


if __name__ == "__main__":
    sys.exit(main())
