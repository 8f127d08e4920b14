"""A module imports from lower layers or from its own folder, and no files import each other in a circle."""

import ast
from pathlib import Path

import lightning_peft

PACKAGE = Path(lightning_peft.__file__).parent
LAYERS = [
    ["neighbours"],
    [
        "user_cache",
        "plugins",
        "threads",
        "allocator",
        "readable",
        "strict_json",
        "compat",
        "other_tools",
        "terminal_table",
        "ctrl_c",
        "free_options",
        "interpolation",
        "written_numbers",
    ],
    ["kernels", "progress", "tasks", "rows_in_memory"],
    ["distributed", "quantization", "data"],
    ["adapters", "models"],
    ["objectives"],
    ["checkpoint", "optim"],
    ["inference", "estimation", "cluster", "tracking"],
    ["evaluation"],
    ["training", "sweeps", "serving"],
    ["report"],
    ["config"],
    ["command_configs"],
    ["schemas", "slips", "tables"],
    ["warm_start", "own_file"],
    ["options", "words"],
    ["composition_errors"],
    ["compose"],
    ["help"],
    ["runs"],
    ["commands"],
    ["command_line"],
    ["api"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_modules(path: Path) -> set[str]:
    """Return the dotted names that the file imports from the package, inside functions and for type checking alike."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("lightning_peft.")}


def imported_parts(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_modules(path)}


def file_imports() -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports."""
    names = {
        ".".join(("lightning_peft", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    return {name: imported_modules(path) & names.keys() - {name} for name, path in names.items()}


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Return modules that lead back to themselves: what is left when those that import nothing left are taken away."""
    left = dict(imports)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    while free := [name for name in left if not any(name in others for others in left.values())]:
        for name in free:
            del left[name]
    return sorted(left)


def test_every_module_imports_from_lower_layers_only():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {other}"
            for other in imported_parts(path)
            if other != part and LEVEL[other] >= LEVEL[part]
        ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle():
    assert circles(file_imports()) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
