"""No step waits for the device, by CUDA's own word.

fp32 is left out: without flash attention each sample is a call of its own, and its bounds are read back.
fp16 is left out: torch's gradient scaler asks at each step whether a gradient overflowed.
"""

import pytest
import torch
from host_syncs import CudaSyncs

from lightning_peft.__main__ import main
from lightning_peft.training.callbacks import training_progress

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "adalora"])
def test_no_step_waits_for_the_cuda_device(method, tmp_path, monkeypatch):
    monkeypatch.setattr(training_progress, "SECONDS_BETWEEN_LINES", float("inf"))
    words = [
        "train", "model=tiny", "data.max_rows=24", "data.max_validation_rows=4", "data.micro_batch_size=1",
        f"method={method}", "trainer.accelerator=gpu", "trainer.precision=bf16-true", "trainer.max_steps=5",
        "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=10", "checkpoint.every_n_steps=null",
        "+callbacks.audit._target_=host_syncs.CudaSyncs", f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    assert main(words) == 0
    assert CudaSyncs.micro_batches == 6
