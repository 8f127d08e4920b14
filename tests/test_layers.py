"""A module imports from lower layers or from its own folder, so the package stays free of import rings."""

import ast
from pathlib import Path

import lightning_peft

PACKAGE = Path(lightning_peft.__file__).parent
LAYERS = [
    ["user_cache"],
    ["kernels"],
    ["distributed", "quantization", "data"],
    ["adapters", "models"],
    ["objectives"],
    ["checkpoint", "optim"],
    ["inference", "estimation", "cluster"],
    ["training", "evaluation"],
    ["config"],
    ["compose"],
    ["runs"],
    ["commands"],
    ["command_line"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported_parts(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names |= {m.split(".")[1] for m in modules if m.startswith("lightning_peft.")}
    return names


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
