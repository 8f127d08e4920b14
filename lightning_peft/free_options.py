"""Options in which the starts of one run may differ."""

NOT_COMPARED = ("resume", "dry_run", "pause_at", "run_dir", "logger", "callbacks", "cluster", "claim", "method")
"""Options that may differ between the starts of one run."""

FREE_TO_CHANGE = (
    "trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "trainer.devices", "trainer.num_nodes",
    "trainer.accumulate_grad_batches", "trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.profiler",
    "trainer.detect_anomaly", "trainer.barebones", "strategy.kind", "strategy.cpu_offload", "data.cache_dir",
    "data.num_workers", "data.preview", "checkpoint.every_n_steps", "checkpoint.keep_last", "checkpoint.asynchronous",
    "validation.samples", "compile", "activation_checkpointing", "device_memory_gib", "quantization.verify",
    "model.label", "guard.action", "guard.factor", "guard.patience", "guard.no_op_steps",
    "guard.lr_factor", "guard.max_rollbacks", "health.every_n_steps", "checkpoint.best_by", "validation.metrics",
    "validation.every_n_steps", "validation.at_steps", "validation.metric_rows", "validation.max_new_tokens",
    "validation.budget",
    "early_stopping.metric", "early_stopping.patience", "early_stopping.min_delta",
)  # fmt: skip
"""Options that a resumed run may change, as they change no number of it. The global batch that some make together must
stay; the schedule's length may change and is said."""
