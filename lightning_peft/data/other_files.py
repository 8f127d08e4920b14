"""Files that hold no rows as they are, and what to do about each: archives, other encodings, other separators."""

from typing import IO

from lightning_peft.data.conversation import read_json

OTHER_FILES = {
    ".txt": '; text without rows is a line {"text": "..."} a document in a .jsonl file',
    ".md": '; text without rows is a line {"text": "..."} a document in a .jsonl file',
    ".xls": "; save it as .xlsx",
    ".pkl": "; a pickle runs code, so save the rows as .parquet or .jsonl",
    ".zip": "; unpack it",
    ".tar": "; unpack it",
    ".yaml": "; a file of options stands without data=, as in lightning-peft train my.yaml",
    ".yml": "; a file of options stands without data=, as in lightning-peft train my.yaml",
}
"""Remedies for files that people bring and that hold no rows as they are."""
_BEGINNINGS = {
    b"\xff\xfe\x00\x00": "text in UTF-32; save it as UTF-8",
    b"\x00\x00\xfe\xff": "text in UTF-32; save it as UTF-8",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed; let its name end in .zst",
    b"\xfd7zXZ\x00": "compressed; let its name end in .xz",
    b"PK\x03\x04": "an archive or an Excel file; let its name end in .xlsx, or unpack it",
    b"PAR1": "Parquet; let its name end in .parquet",
    b"ARROW1": "Arrow; let its name end in .arrow",
}
"""First bytes of what is no text in UTF-8, what it is, and what to do; the first that fits counts."""
_HOLDERS = ("data", "rows", "examples", "instances", "items", "records", "samples", "train")
"""Keys of one object inside which exports put all rows."""
_LARGEST_OBJECT = 2**28


def refuse_other_content(start: bytes, file: str) -> None:
    """Raise ValueError for a file of text by its name that begins as another kind of file does."""
    if what := next((what for begin, what in _BEGINNINGS.items() if start.startswith(begin)), None):
        raise ValueError(f"{file}: is {what}")


def refuse_one_object(content: IO[bytes], file: str) -> None:
    """Raise ValueError for a JSON file that is one object over several lines, or one that holds all rows inside."""
    first = content.readline()
    whole = _object_in(first)
    is_long = whole is None
    if whole is None:
        rest = content.read(_LARGEST_OBJECT)
        whole = _object_in(first + rest) if len(rest) < _LARGEST_OBJECT else None
    if whole is None:
        return
    inside = next((key for key in _HOLDERS if _are_objects(whole.get(key))), None)
    if inside is not None:
        raise ValueError(
            f"{file}: is one object whose rows are inside {inside!r}; rows are an array of objects, or an object a "
            f"line, as `jq -c '.{inside}[]' FILE` writes them"
        )
    if is_long:
        raise ValueError(f"{file}: is one object over several lines; rows are an array of objects, or an object a line")


def _object_in(text: bytes) -> dict[str, object] | None:
    try:
        value = read_json(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def refuse_other_separator(names: list[str], separator: str, origin: str) -> None:
    """Raise ValueError for a header of one column that is several by another separator."""
    if names and names[0].startswith("sep="):
        raise ValueError(f"{origin}: {names[0]!r} tells Excel of a separator and names no columns; delete the line")
    if len(names) != 1:
        return
    for other, word in _SEPARATORS.items():
        if other != separator and other in names[0]:
            columns = ", ".join(name.strip() for name in names[0].split(other))
            kind = ".tsv" if separator == "\t" else ".csv"
            remedy = "name it .tsv" if other == "\t" else f"save it with {_SEPARATORS[separator]}"
            if other == "," and separator == "\t":
                remedy = "name it .csv"
            raise ValueError(
                f"{origin}: fields of {kind} files are separated by {_SEPARATORS[separator]}, and these ({columns}) by "
                f"{word}; {remedy}"
            )
