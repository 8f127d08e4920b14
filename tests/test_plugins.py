"""Modules that `imports` names: by a dotted name, found again where a run is started from its saved config."""

import sys

import pytest
import started

from lightning_peft.plugins import PluginError, import_modules, imported_by_words, keep_modules
from lightning_peft.tables import TABLES


def command(*words, cwd):
    return started.run([*started.COMMAND, *words], cwd=cwd)


ROWS = '{"prompt":"Hi","completion":"Hello"}\n' * 4


@pytest.mark.parametrize(
    ("name", "example"),
    [("./mine", "imports=[mine]"), ("mine.py", "imports=[mine]"), ("/there/mine.py", "imports=[mine]"),
     (".mine", "imports=[mine]"), ("conf/mine", "imports=[mine]"), ("a b", "module"), ("mine.", "module")],
)  # fmt: skip
def test_what_is_no_name_of_a_module_is_refused(name, example):
    with pytest.raises(PluginError, match=r"must be a module by its dotted name") as wrong:
        imported_by_words([f"imports=[{name}]"], TABLES)
    assert example in str(wrong.value) and "\n" not in str(wrong.value)


def test_name_from_a_file_need_not_be_text():
    with pytest.raises(PluginError, match="^imports=7: must be a module"):
        import_modules([7], TABLES)


def test_module_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=f"no module of that name in the working folder .{tmp_path}. or on"):
        import_modules(["not_there_at_all"], TABLES)


def test_kept_modules_are_those_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    (tmp_path / "here" / "own_package" / "part").mkdir(parents=True)
    for file in ("own_single.py", "own_package/__init__.py", "own_package/part/__init__.py", "own_package/other.py"):
        (tmp_path / "here" / file).write_text("X = 1\n")
    (tmp_path / "here" / "own_space").mkdir()
    (tmp_path / "here" / "own_space" / "inside.py").write_text("X = 2\n")
    names = ["own_single", "own_package.part", "own_space.inside", "json", "torch.nn"]
    import_modules(names, TABLES)
    keep_modules(names, tmp_path / "kept")
    kept = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*.py"))
    package = ["own_package/__init__.py", "own_package/other.py", "own_package/part/__init__.py"]
    assert kept == [*package, "own_single.py", "own_space/inside.py"]
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.slow
def test_run_goes_on_from_another_folder_with_its_modules(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    (here / "rows.jsonl").write_text(ROWS)
    (here / "own_sign.py").write_text("import sys\n\nprint('signed', file=sys.stderr)\n")
    words = ["model=tiny", f"data={here}/rows.jsonl", "data.validation_fraction=0", "trainer.max_steps=1"]
    first = command("train", *words, "imports=[own_sign]", "run_dir=run", cwd=here)
    assert first.returncode == 0 and "signed" in first.stderr, first.stderr
    (here / "run" / "result.json").unlink()
    again = command("train", f"config_path={here}/run/config.yaml", "resume=auto", cwd=there)
    assert again.returncode == 0 and "signed" in again.stderr, again.stderr
    assert (
        f"imports=own_sign: not found here, so as it was when the run began, from {here}/run/own_files" in again.stderr
    )
