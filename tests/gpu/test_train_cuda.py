"""The main job on a CUDA device: train, score, resume, on dense and 4-bit bases, in bf16 and fp16."""

import json

import pytest
import torch

from lightning_peft.__main__ import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RUN = ["train", "model=tiny", "data.max_rows=24", "data.max_validation_rows=4", "data.micro_batch_size=2"]


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "full"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_train_and_evaluate(method, precision, tmp_path):
    if method == "full" and precision == "bf16-true":
        precision = "bf16-mixed"
    words = [f"method={method}", f"trainer.precision={precision}", f"run_dir={tmp_path}/run", "optimizer.lr=0.005"]
    assert main([*RUN, *words, "trainer.max_steps=4", "trainer.accelerator=gpu"]) == 0
    assert main(["evaluate", f"adapter_path={tmp_path}/run", "max_rows=4", "samples=0"]) == 0
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["adapter"]["loss"] < report["base"]["loss"]


@pytest.mark.parametrize("method", ["lora", "qdora"])
@pytest.mark.parametrize("checkpointing", ["none", "blocks", "selective"])
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-true", 0.05)])
def test_compiled_steps_equal_plain_ones(method, checkpointing, precision, tolerance, tmp_path):
    found = {}
    for mode in ("none", "blocks"):
        words = [f"method={method}", f"compile={mode}", f"activation_checkpointing={checkpointing}"]
        words += [f"trainer.precision={precision}", "trainer.max_steps=4", f"run_dir={tmp_path}/{mode}"]
        assert main([*RUN, *words, "trainer.accelerator=gpu"]) == 0
        header, *rows = (tmp_path / mode / "metrics.csv").read_text().splitlines()
        columns = [header.split(",").index(name) for name in ("loss", "grad_norm")]
        found[mode] = [float(row.split(",")[column]) for row in rows for column in columns]
    assert found["blocks"] == pytest.approx(found["none"], rel=tolerance)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_offloaded_slices_take_the_same_steps(method, tmp_path):
    losses = {}
    for name, words in {
        "single": [], "fsdp": ["strategy=fsdp"], "offloaded": ["strategy=fsdp", "strategy.cpu_offload=true"],
    }.items():  # fmt: skip
        words = [*words, f"method={method}", "trainer.precision=32-true", "trainer.max_steps=4", "compile=none"]
        words += ["quantization.verify=true"] if method == "qlora" else []
        assert main([*RUN, *words, "trainer.devices=1", "trainer.accelerator=gpu", f"run_dir={tmp_path}/{name}"]) == 0
        header, *rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        losses[name] = [float(row.split(",")[header.split(",").index("loss")]) for row in rows]
    assert losses["fsdp"] == pytest.approx(losses["single"], rel=1e-4)
    assert losses["offloaded"] == pytest.approx(losses["single"], rel=1e-4)


def test_fp16_gradients_are_clipped_at_their_true_norm(tmp_path):
    """The norm logged under a loss scale of 65,536 is the norm fp32 sees."""
    norms = {}
    for precision in ("16-mixed", "32-true"):
        words = [f"trainer.precision={precision}", f"run_dir={tmp_path}/{precision}", "trainer.max_steps=2"]
        assert main([*RUN, *words, "trainer.accelerator=gpu"]) == 0
        header, row, *_ = (tmp_path / precision / "metrics.csv").read_text().splitlines()
        norms[precision] = float(dict(zip(header.split(","), row.split(","), strict=True))["grad_norm"])
    assert norms["16-mixed"] == pytest.approx(norms["32-true"], rel=0.02)
