"""Everyday words of the command line: a YAML file of one's own, rank=16, model=org/name, data=rows.csv.

Names that other tools use are answered with ours.
"""

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from hydra.errors import OverrideParseException

from lightning_peft.data.config import named_sources
from lightning_peft.other_tools import BY_THEIRS as BY_THEIRS
from lightning_peft.other_tools import option_meant, plain_name
from lightning_peft.own_file import SOURCES_KEY, flat_words, refuse_file_of_another_tool, typed_value, words_of_file
from lightning_peft.schemas import CONF_DIR, ROOTS
from lightning_peft.slips import check_dashes, corrected, with_home

logger = logging.getLogger(__name__)

ROW_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".bz2", ".xz", ".zst")
"""Endings by which data=FILE is told from the name of an option."""
OWN_FOLDER = "conf_dir"
"""The word for a folder of one's own options, as conf_dir=conf with conf/model/mine.yaml for model=mine."""
TAKE_WORDS = ("sweep", "init", "config", "schema", "completion", "models")
"""Commands whose words are no keys of theirs."""
RUN_COMMANDS = ("train", "submit", "estimate", "data")
"""Commands whose words describe a training."""
OF_ONE_KEY = {"rank": "adapter.rank", "target_modules": "adapter.target_modules"}
"""Groups whose options are names for values of one key."""
Word = tuple[str, bool]
"""A word, and whether it stands in a file of one's own."""

FIRST_WORD = {
    **dict.fromkeys(
        ("evaluate", "pairs", "calibrate", "inspect", "convert", "generate", "merge", "export", "push"), "adapter_path"
    ),
    "report": "path",
}
"""The key of what a command works on, for which its bare word stands."""


def everyday(command: str, words: list[str], before: Sequence[str] = ()) -> list[str]:
    """Rewrite the everyday words of a command into the keys and groups that Hydra knows.

    `before` are words that all of the others win over, as they do over those of a file.
    Raises ValueError for a word of another tool, or in another tool's form, with ours beside it.
    """
    given: list[Word] = [(word, True) for word in before]
    bare: list[str] = []
    files: dict[Path, list[str]] = {}
    check_dashes(command, words)
    for word in corrected(words) if command not in TAKE_WORDS else words:
        file = word.removeprefix("recipe=")
        if "=" not in file and file.endswith((".yaml", ".yml")) and command in RUN_COMMANDS:
            path = Path(with_home(file))
            files[path] = words_of_file(path)
            given += [(part, True) for part in files[path]]
        elif command in RUN_COMMANDS and not re.search("^~|=", word) and (meant := _meant_by_bare(word)) is not None:
            raise ValueError(f"{word}: not of the form key=value; {meant}")
        elif command in FIRST_WORD and re.fullmatch(r"[^=+~]+", word):
            bare.append(word)
        else:
            given.append((word, False))
    given += [(word, False) for word in _of_bare_words(command, bare)]
    folders = [word.partition("=")[2] for word, _ in given if word.startswith(f"{OWN_FOLDER}=")]
    if not folders and not any("hydra.searchpath=" in word for word, _ in given):  # there may be groups of one's own
        for path, of_file in files.items():
            refuse_file_of_another_tool(path, of_file, roots_of(command))
    if command in (*RUN_COMMANDS, "serve", *FIRST_WORD.keys() - {"push", "report"}):
        places = (CONF_DIR, *map(Path, folders))
        # Words count as typed, so that model=tiny takes a file's org/name back, and as rewritten, where rank is
        # adapter.rank.
        typed = _without_overridden(given)
        given = _without_overridden(
            [(p, of_file) for word, of_file in typed for p in _rewritten(word, places, command)]
        )
    written = [word for word, _ in given]
    if folders:
        written = [word for word in written if not word.startswith(f"{OWN_FOLDER}=")]
        written = [_search_path(folders, written), *written]
    if command in RUN_COMMANDS:
        written = [word for word in _with_data_option(written) if word != "run_dir=null"]  # null is the same as no word
        written = [*_of_warm_start(written), *written]
    return written


def _without_overridden(words: list[Word]) -> list[Word]:
    """Return the words, without words of a file whose key a later word gives as well.

    Hydra lets the later of two keys win by itself, but a key win over a group, and it takes none twice in a sweep.
    """
    kept: list[Word] = []
    given: set[str] = set()
    for word, is_of_file in reversed(words):
        key = word.partition("=")[0].lstrip("+")
        if is_of_file and key in given:
            continue
        if key != OWN_FOLDER:  # there may be several folders
            given |= {key, OF_ONE_KEY.get(key, key)}
        kept.append((word, is_of_file))
    return kept[::-1]


def _search_path(folders: list[str], words: list[str]) -> str:
    """Return Hydra's word for folders with options of one's own. Raises ValueError for a word that is no folder."""
    if given := next((word for word in words if word.startswith("hydra.searchpath=")), None):
        raise ValueError(f"{OWN_FOLDER}={folders[0]} and {given}: give all folders by one of them")
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{OWN_FOLDER}={folder}: no such folder; it holds GROUP/NAME.yaml, as model/mine.yaml")
    return f"hydra.searchpath=[{','.join(typed_value(f'file://{Path(folder).resolve()}') for folder in folders)}]"


def _of_bare_words(command: str, words: list[str]) -> list[str]:
    """Return bare words as the key that the command works on. Raises ValueError for more than the command takes."""
    if not words:
        return []
    key = FIRST_WORD[command]
    if command == "convert" and len(words) > 1:
        return [f"{key}=[{','.join(words)}]"]
    if command == "inspect" and len(words) == 2:
        return [f"{key}={words[0]}", f"other_path={words[1]}"]
    if len(words) > 1:
        raise ValueError(f"{' '.join(words)}: {command} takes one of them; its options are key=value")
    return [f"{key}={words[0]}"]


def _rewritten(word: str, folders: Sequence[Path], command: str) -> list[str]:
    key, sign, value = word.partition("=")
    if not sign:
        return [word]
    if key == "data" and value.startswith("[") and (entries := _entries(value)) and all(map(_is_rows, entries)):
        return ["data=jsonl", f"data.train_path=[{','.join(entries)}]"]
    if (group := key.lstrip("+")) in _groups(folders) and (command in RUN_COMMANDS or group not in ("rank", "method")):
        if group in _groups((CONF_DIR,)):  # a group of one's own is added with its plus
            key, word = group, f"{group}={value}"
        _check_option(group, value, folders)
    if key == "cluster" and command == "train":
        raise ValueError(f"{word}: train runs here; submit takes the same words and hands them to the cluster")
    if key == "adapters" and value.startswith("[") and value.endswith("]"):
        entries = _entries(value)
        return ["adapters=[" + ",".join(f"'{entry}'" for entry in entries if entry) + "]"]
    if key == SOURCES_KEY and value.startswith("["):
        return _words_of_list(word)
    if command == "convert" and key in ("rank", "method"):  # Hydra knows these as groups
        return [f"{'svd_rank' if key == 'rank' else 'to'}={value}"]
    if key == "adapter.layers" and re.fullmatch(r"\[[\d\s,-]+\]", value):
        return [f"{key}='{re.sub(r'[^0-9,-]', '', value)}'"]
    if key == "rank" and command in RUN_COMMANDS and re.fullmatch(NUMBERS, number := value.strip("'\"\u00a0")):
        return [f"adapter.rank={number}"]
    if key == "rank" and command in RUN_COMMANDS and re.fullmatch(SWEEP_OF_NUMBERS, value):
        return [f"adapter.rank={value}"]
    if key.endswith("target_modules") and plain_name(value) in ("all", "all_linear") and command in RUN_COMMANDS:
        return [f"{key}=all_linear"]
    if key == "target_modules" and value.startswith("["):
        return [f"adapter.target_modules={value}"]
    if key == "target_modules" and all(_no_option("target_modules", name, folders) for name in value.split(",")):
        return [f"adapter.target_modules=[{value}]"]
    if key == "model" and "," not in value and _no_option("model", value, folders) and _is_model(value):
        return ["model=hf", f"model.path={value}"]
    if key == "objective.teacher":
        return [f"{key}={_of_preset(value, folders)}"]
    if key == "data" and "," not in value and _no_option("data", value, folders) and _is_rows(value):
        return ["data=jsonl", f"data.train_path={value}"]
    return [word]


def _entries(value: str) -> list[str]:
    """Return the texts of a list such as [a,b], without quotes."""
    return [text for entry in value.strip("[]").split(",") if (text := entry.strip().strip("'\""))]


def _words_of_list(word: str) -> list[str]:
    """Return the words that data.sources=[{...},{...}] stands for, each entry by its name."""
    from hydra.core.override_parser.overrides_parser import (
        OverridesParser,
    )  # slow to import

    try:
        entries = OverridesParser.create().parse_override(word).value()
    except OverrideParseException as error:
        raise ValueError(f"{word}: not of the form {SOURCES_KEY}=[{{train_path: FILE}},...]") from error
    assert isinstance(entries, list)
    return list(flat_words({"data": {"sources": named_sources(entries)}}, "", Path()))


NUMBERS = r"[-+]?[\d.][\d.e_+-]*(,[-+]?[\d.][\d.e_+-]*)*"
SWEEP_OF_NUMBERS = r"(?:\w+\()+(?:[-+\d.,\s)]|\b[a-z]+=|\btrue\b|\bfalse\b)*\)+"
"""Sweeps by a function of Hydra with no name in it, as range(4,9,4) or sort(choice(4,8))."""


def _groups(folders: Sequence[Path]) -> set[str]:
    """Return the names of the groups; the options of adapter come from the table of methods and have no folder."""
    return {"adapter"} | {path.name for folder in folders for path in folder.glob("*/")}


def options_of_group(group: str, folders: Sequence[Path] = (CONF_DIR,)) -> list[str]:
    """Return the names of a group's options, those of folders of one's own too."""
    files = [path.relative_to(folder / group) for folder in folders for path in (folder / group).glob("**/*.yaml")]
    return sorted(str(path.with_suffix("")) for path in files)


FIRST_ROWS = re.compile(r"(.+?)(?:[:#]|\[:)(\d+)\]?")
"""A file with how many of its rows are to be taken, as other tools write it."""


def roots_of(command: str) -> set[str]:
    """Return the first parts of a command's keys, those of its sweep too, and the names of the groups."""
    configs = (ROOTS.get(command, ROOTS["train"]), ROOTS["submit_sweep"])
    return {field.name for config in configs for field in fields(config)} | _groups((CONF_DIR,)) | {OWN_FOLDER}


def _check_option(group: str, value: str, folders: Sequence[Path]) -> None:
    """Raise ValueError for what cannot be the name of an option: nothing, a number, null, true, a list of several."""
    if value.startswith("[") and group not in ("logger", "target_modules"):
        raise ValueError(
            f"{group}={value}: takes one option; add -m and write {group}={value[1:].rstrip(']')} for a sweep"
        )
    # A sweep over option files ends in Hydra here: Hydra takes a number for no name, and says so without the word.
    parts = re.sub(r"^(?:choice|sort|shuffle)\((.*)\)$", r"\1", value).split(",")
    number = next((part.strip() for part in parts if re.fullmatch(NUMBERS, part.strip())), None)
    if number is not None and any(re.match("[A-Za-z]", part.strip()) for part in parts) and "(" not in parts[0]:
        if group == "rank":
            raise ValueError(f"{group}={value}: numbers beside names; give numbers alone, as in rank=4,8, or names")
        if group != "target_modules" and _no_option(group, number, folders):
            raise ValueError(no_such_option(group, number, options_of_group(group, folders)))
    is_number = value.lower().lstrip("+-") in ("inf", "nan")  # numbers of Hydra's, and not of YAML's
    is_other = group in ("rank", "target_modules") and value not in ("", "null") and not value.startswith("true")
    if is_other and not is_number:
        return  # a number, or names of layers
    is_name = value and isinstance(yaml.safe_load(value) if re.fullmatch(r"[\w.+-]+", value) else value, str)
    is_name = is_name and not is_number and not (group == "data" and FIRST_ROWS.fullmatch(value))
    if not is_name and _no_option(group, value, folders):
        raise ValueError(no_such_option(group, value, options_of_group(group, folders)))


def no_such_option(group: str, name: str, options: Sequence[str]) -> str:
    """Say that a group has no such option, which one was meant where that can be told, and which there are."""
    said = f"{group}={name}: no such option"
    if group == "adapter" and name not in options:
        left = "leave it out, or " if name in ("", "null") else ""
        return f"{said}; {left}choose a method as method=lora, and its own keys as adapter.rank=8"
    if (meant := option_meant(group, name, options)) is not None:
        said += f"; use {meant}"
    elif name.startswith("$") and not name.startswith("${"):
        said += "; a variable of the environment is ${oc.env:" + name[1:] + "}"
    elif group == "data" and (first := FIRST_ROWS.fullmatch(name)) is not None:
        said += f"; use data={first.group(1)} data.max_rows={first.group(2)}"
    elif group == "data" and (there := _rows_of_name(name)) is not None:
        said += f"; did you mean data={there}?"
    elif group == "data" and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        said += f", file or folder; for a data set of the hub use data=hub data.hub_name={name}"
    elif group == "data" and re.fullmatch(r".*\.\w{2,7}", name):
        said += f"; files of rows end in {', '.join(ROW_FILES)}"
    elif group == "model" and name.endswith(ROW_FILES):
        said += f"; rows are data={name}"
    elif group == "model" and name.endswith((".safetensors", ".bin", ".pt", ".pth")):
        said += "; a model is the folder with its config.json, or a .gguf file"
    elif group == "model" and name not in ("", "null"):
        said += f"; for a model of the hub use model=hf model.path={name}"
    if group == "rank":
        return f"{said}; rank is one of {', '.join(options)}, or any number, as in rank=16"
    return f"{said}; {group} is one of {', '.join(options)}"


def _meant_by_bare(word: str) -> str | None:
    """Return what a word without = was meant for; None where that cannot be told."""
    path = Path(word)
    if word in ("help", "version"):
        return f"use --{word}"
    if word == "dry_run":
        return "use dry_run=true"
    if path.with_suffix(".yaml").is_file():
        return f"did you mean {path.with_suffix('.yaml')}?"
    if word.lower().endswith((".yaml", ".yml", ".toml", ".cfg", ".ini")):
        return "a file of options is YAML and ends in .yaml"
    if path.is_dir():
        return f"use data={word} for rows, model={word} for a model"
    if path.suffix == ".json" and path.is_file() and _begins_as_options(path):
        return f"use data={word} for rows; a file of options is YAML and ends in .yaml, and JSON is YAML"
    if _is_rows(word):
        return f"use data={word}"
    for group in ("method", "model", "hardware", "objective", "data", "strategy"):
        if plain_name(word) in map(plain_name, options_of_group(group)):
            return f"use {option_meant(group, word, options_of_group(group))}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", word):
        return f"use model={word} for a model, data=FILE for rows"
    return None


def _begins_as_options(path: Path) -> bool:
    """Return whether a JSON file holds keys and values, and no list of rows; files of rows may be large."""
    with path.open("rb") as file:
        return file.read(2000).lstrip()[:1] == b"{"


def _no_option(group: str, name: str, folders: Sequence[Path]) -> bool:
    return not any((folder / group / f"{name}.yaml").is_file() for folder in folders)


def _of_preset(name: str, folders: Sequence[Path]) -> str:
    """Return the path that the model option file of this name holds, and the name where there is no such file."""
    files = [folder / "model" / f"{name}.yaml" for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    path = yaml.safe_load(found.read_text(encoding="utf-8")).get("path") if found is not None else None
    return str(path or name)


ON_HUB = re.compile(r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+(?:/[\w.-]+)?)(?:[/?#].*)?")
"""An address of a model on the hub, as it is copied from a page."""


def _is_model(value: str) -> bool:
    text = value.strip("'\"")
    is_there = Path(text).exists()
    if (address := ON_HUB.fullmatch(text) or re.fullmatch(r"(\w[\w.-]*/[\w.-]+)/", text)) and not is_there:
        name = address.group(1)
        word = f"model={name}" if "/" in name else f"model=hf model.path={name}"
        raise ValueError(f"model={text}: give its name on the hub, as in {word}")
    if re.match("https?://", text):
        raise ValueError(f"model={text}: is no address of the hub; fetch it, and give the folder or the .gguf file")
    if (revision := re.fullmatch(r"(\w[\w.-]*/[\w.-]+)[@:]([\w.-]+)", text)) and not is_there:
        name, commit = revision.groups()
        raise ValueError(f"model={text}: give the revision beside it, as in model={name} model.revision={commit}")
    return "/" in text or text.endswith(".gguf") or Path(text).is_dir()


def _rows_of_name(name: str) -> str | None:
    """Return the file of rows that a name is nearly that of; None without one."""
    place = Path(name).parent
    there = [str(path) for path in place.iterdir() if path.suffix in ROW_FILES] if place.is_dir() else []
    by_stem = next((file for file in there if Path(file).stem == Path(name).name), None)
    return by_stem or next(iter(difflib.get_close_matches(name, there, n=1, cutoff=0.8)), None)


def _is_rows(value: str) -> bool:
    text = value.strip("'\"")
    return (
        text.lower().endswith((*ROW_FILES, ".txt", ".xls"))
        or "://" in text
        or Path(text).is_dir()
        or Path(text).exists()
        and bool("/" in text or Path(text).suffix)
    )


_OPTION_OF_ROWS = {"data.train_path": "jsonl", SOURCES_KEY: "jsonl", "data.hub_name": "hub"}
"""Keys that name rows of one's own, each with the option of `data` that reads such rows."""


def _with_data_option(words: list[str]) -> list[str]:
    """Have rows of one's own read as files, or from the hub, where no data set is named.

    The default's own rows would hide them, or its system prompt stand before them.
    """
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    roots = {SOURCES_KEY if key.startswith(f"{SOURCES_KEY}.") else key: key for key in reversed(keys)}
    given = next((key for key in _OPTION_OF_ROWS if key in roots), None)
    if given is not None and "data" not in keys:
        option = _OPTION_OF_ROWS[given]
        logger.info("data=%s, as %s is given", option, roots[given])
        return [f"data={option}", *words]
    return words


def _of_warm_start(words: list[str]) -> list[str]:
    """Return words to precede all others of a run that continues an adapter: its folder's, unless the user's."""
    given = {key.lstrip("+"): value for key, sign, value in (word.partition("=") for word in words) if sign}
    folder = given.get("adapter.init_from", "null").strip("'\"")
    if folder in ("", "null") or "config_path" in given or not Path(folder).exists() and "," in folder:
        return []
    # This imports the formats of adapters, and torch with them.
    from lightning_peft.warm_start import words_of_folder

    return [f"{key}={typed_value(value)}" for key, value in words_of_folder(folder, set(given))]
