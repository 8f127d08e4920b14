"""`report`: one page that needs no network, of a run or a sweep, with every number that the files hold."""

import csv
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from tiny_runs import TINY
from wandb_server import wandb_server

from lightning_peft.__main__ import main
from lightning_peft.report.run import run_page, with_interval
from lightning_peft.report.sweep import sweep_page
from lightning_peft.sweeps.sweep import Sweep, Trial, refresh, write_sweep


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    words = ["trainer.max_steps=4", "data.max_validation_rows=4", "validation.every_n_steps=2", "validation.samples=2"]
    assert main(["train", *TINY, *words, f"run_dir={folder}"]) == 0
    assert main(["evaluate", str(folder), "max_rows=4", "samples=0"]) == 0
    return folder


class Page(HTMLParser):
    """Tables and pictures of a page, and whatever it would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.cells, self.figures, self.fetched, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "td":
            self.cells.append(attributes["data-v"])
        if tag == "figure":
            self.figures.append(attributes["id"])
        self.fetched += [value for name, value in attributes.items() if name in ("src", "href") and "#" != value[0]]

    def handle_data(self, data):
        self.text += data


def test_run_has_its_curves_scores_samples_and_origin(run, capsys):
    assert main(["report", str(run), "png=true"]) == 0
    page = Page((run / "report.html").read_text())
    assert page.fetched == []
    assert page.figures[:3] == ["loss", "loss_over_tokens", "lr"]
    result, scores = (json.loads((run / name).read_text()) for name in ("result.json", "evaluation.json"))
    assert {str(result["validation_loss"]), str(scores["base"]["loss"]), str(scores["adapter"]["loss"])} <= {
        *page.cells
    }
    assert "Answers at step 4" in page.text and "base_fingerprint" in page.text and "optimizer:" in page.text
    for name in page.figures:
        assert (run / f"report_{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_columns_of_many_layers_are_one_picture_a_kind(tmp_path):
    layers = [f"model.layers.{number}.self_attn.q_proj" for number in range(64)]
    columns = [f"health/{layer}/{kind}" for layer in layers for kind in ("change", "stable_rank")]
    columns += ["validation_loss/a", "validation_loss/b", "lr/lora_B", "reward_margin"]
    with (tmp_path / "metrics.csv").open("w") as file:
        file.write(",".join(["step", "loss", *columns]) + "\n")
        for step in range(1, 6):
            file.write(",".join([str(step), "1", *(str(step * (1 + place)) for place in range(len(columns)))]) + "\n")
    page = run_page(tmp_path)
    assert list(page.figures) == [
        "loss", "health_change", "health_stable_rank", "validation_loss", "lr", "reward_margin"
    ]  # fmt: skip
    (change,) = page.figures["health_change"].axes
    assert [line.get_label() for line in change.lines] == ["highest", "median", "lowest"]
    assert list(change.lines[1].get_ydata()) == [step * 64.0 for step in range(1, 6)]
    assert f"64 curves, the highest, median and lowest value at each step; at the end {layers[-1]} is" in page.text()
    (losses,) = page.figures["validation_loss"].axes
    assert [line.get_label() for line in losses.lines] == ["a", "b"]


def test_interval_is_wilsons():
    # Newcombe 1998, table I, method 3: 81 of 263 gives 0.2553 to 0.3662.
    assert with_interval(81 / 263, 263) == "30.8% (25.5% to 36.6%)"
    assert with_interval(0.0, 20) == "0.0% (0.0% to 16.1%)"
    assert with_interval(3.5, 20) == "3.5"


def sweep_of(folder, axes, value, **options):
    """Write a sweep folder as trials leave it: result.json and metrics.csv of each."""
    trials = []
    for values in itertools.product(*axes.values()):
        name = "_".join(f"{key.rpartition('.')[2]}{choice}" for key, choice in zip(axes, values, strict=True))
        (folder / name).mkdir(parents=True)
        number = value(*values)
        result = {"status": "finished" if number is not None else "diverged", "validation_loss": number, "steps": 2}
        (folder / name / "result.json").write_text(json.dumps(result))
        with (folder / name / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["step", "loss"], [1, 3.0], [2, 2.0 if number is None else number]])
        trials.append(Trial(name, [f"{key}={choice}" for key, choice in zip(axes, values, strict=True)]))
    swept = [f"{key}={','.join(map(str, choices))}" for key, choices in axes.items()]
    sweep = Sweep([], swept, "local", options.get("metric", "validation_loss"), count=len(trials), trials=trials)
    write_sweep(sweep, folder)
    refresh(sweep, folder, {})
    return sweep


def shown_numbers(page):
    """Return the numbers shown: texts that are drawn as paths carry their characters in comments of the SVG."""
    return set(re.findall(r"<!-- (-?[\d.]+) -->", page.text()))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_swept_key_and_number_is_shown(count, tmp_path):
    axes = {"adapter.rank": [4, 8], "optimizer.lr": [0.001, 0.01], "adapter.alpha": [8, 16], "method": ["lora", "dora"]}
    axes = dict(itertools.islice(axes.items(), count))
    numbers = {values: 1 + 0.0625 * place for place, values in enumerate(itertools.product(*axes.values()))}
    page = sweep_page(tmp_path, sweep_of(tmp_path, axes, lambda *values: numbers[values]))
    named = [key.rpartition(".")[2] for key in axes if not (count == 3 and key == "optimizer.lr")]
    assert all(f"<!-- {name} -->" in page.text() for name in named)
    cells = Page(page.text()).cells
    assert {str(number) for number in numbers.values()} <= set(cells)
    if count in (2, 3):
        assert {f"{number:.4g}" for number in numbers.values()} <= shown_numbers(page)
    if count == 3:
        assert "<!-- lr 0.001 -->" in page.text() and "<!-- lr 0.01 -->" in page.text()


def test_seeds_are_averaged_and_said_and_trials_without_a_number_named(tmp_path):
    axes = {"adapter.rank": [4, 8], "adapter.alpha": [8, 16], "seed": [0, 1]}
    page = sweep_page(
        tmp_path,
        sweep_of(tmp_path, axes, lambda rank, alpha, seed: None if rank == 8 else 1.25 + seed + alpha / 16),
    )
    assert {"2.25", "2.75"} <= shown_numbers(page)
    assert "mean of up to 2 trials that differ by seed" in page.text()
    assert "rank8_alpha8_seed0 (diverged)" in page.text()


def test_larger_is_better_keeps_its_sign(tmp_path):
    sweep = sweep_of(tmp_path, {"adapter.rank": [4, 8]}, lambda rank: rank / 16, metric="-validation_loss")
    assert "best validation_loss: 0.5 of rank8" in sweep_page(tmp_path, sweep).text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "path=...: has to be given"),
        (["report", "/no/run"], "path=/no/run: no such folder"),
        (["report", "EMPTY"], "has no metrics.csv with a step in it"),
        (["report", "RUN", "output=page.pdf"], "output=page.pdf: must end in .html"),
    ],
)
def test_what_cannot_be_shown_is_said(words, message, run, tmp_path, capsys):
    names = {"EMPTY": str(tmp_path), "RUN": str(run)}
    assert main([names.get(word, word) for word in words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_sorts_the_table(tmp_path):
    """The page's own script, in a real browser without a network: a click on a heading sorts by numbers."""
    numbers = {2: 1.5, 4: 10.0, 8: 9.0}
    page = sweep_page(tmp_path, sweep_of(tmp_path, {"adapter.rank": list(numbers)}, numbers.__getitem__)).text()
    click = "<script>[...document.querySelectorAll('th')].find(h=>h.textContent=='validation_loss').onclick()</script>"
    clicks = page.replace("</body>", f"{click}{click}</body>")
    (tmp_path / "page.html").write_text(clicks)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/page.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert re.findall(r'<tr><td data-v="(rank\d)"', shown) == ["rank4", "rank8", "rank2"]


@pytest.fixture
def logged_sweep(tmp_path, monkeypatch):
    """Return the folder of a sweep whose trials were logged to W&B."""
    folder = tmp_path / "a sweep"
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    sweep = sweep_of(folder, {"adapter.rank": [4, 8], "optimizer.lr": [0.001, 0.01]}, lambda rank, lr: rank * lr)
    for number, trial in enumerate(sweep.trials):
        (folder / trial.name / "config.yaml").write_text("logger: {wandb: {project: ours}}\n")
        (folder / trial.name / "wandb_run.json").write_text(json.dumps({"id": f"run{number}", "step": 9}))
    return folder


HAS_WORKSPACES = importlib.util.find_spec("wandb_workspaces") is not None


@pytest.mark.parametrize(
    "is_installed",
    [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_WORKSPACES, reason="no wandb-workspaces"))],
)
def test_report_in_wandb_without_what_it_needs_is_refused_by_one_line(logged_sweep, monkeypatch, capsys, is_installed):
    if not is_installed:
        monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb_workspaces" else True)
    assert main(["report", str(logged_sweep), "wandb=true"]) == 2
    reason = (
        "W&B writes reports on its server only; give it a key"
        if is_installed
        else "needs wandb-workspaces; pip install"
    )
    assert capsys.readouterr().err.startswith(f"error: wandb=true: {reason}")
    assert not (logged_sweep / "report.html").exists()
    assert main(["report", str(logged_sweep)]) == 0 and (logged_sweep / "report.html").exists()


@pytest.mark.skipif(not HAS_WORKSPACES, reason="no wandb-workspaces")
@pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
def test_report_of_a_sweep_is_written_in_wandb(logged_sweep, monkeypatch, capsys):
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        assert main(["report", str(logged_sweep), "wandb=true"]) == 0
        assert "/me/ours/reports/" in capsys.readouterr().out
        (sent,) = server.reports
        assert (sent["entityName"], sent["projectName"], sent["displayName"]) == ("me", "ours", "Sweep a sweep")
        for text in (
            "best validation_loss: 0.004 of ",
            "run0",
            "run3",
            "config:adapter.value.rank",
            "config:optimizer.value.lr",
            "summary:validation/loss",
        ):
            assert text in sent["spec"], text
        server.is_refusing = True
        assert main(["report", str(logged_sweep), "wandb=true"]) != 0
        printed = capsys.readouterr()
        assert "error: no report was written in W&B: " in printed.err and "Traceback" not in printed.err
    (logged_sweep / "report.html").unlink()
    assert main(["report", str(logged_sweep), "wandb=true"]) != 0  # its server is gone
    assert (logged_sweep / "report.html").exists()
