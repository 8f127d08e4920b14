"""The private members that the package leans on are there, mean what they are taken for, and are used in one place."""

import ast
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import compat

PACKAGE = Path(lightning_peft.__file__).parent
HIDDEN = {
    "_should_accumulate", "_should_check_val_fx", "_data_fetcher", "_signal_connector", "_SignalConnector",
    "_step_supports_amp_scaling", "_set_params_and_buffers_to_ignore_for_model", "_fsdp_param", "ConfigLoaderImpl",
    "maybe_mark_dynamic", "_get_fsdp_state", "_fsdp_param_group", "_module_info", "_sharded_param_data",
    "_get_default_store", "_world", "_get_sequence_number_for_group", "_get_backend", "_device_types",
}  # fmt: skip


class Line(LightningModule):
    """y = w x, with a validation of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.automatic_optimization = True

    def training_step(self, batch, index):
        return self.layer(batch).mean()

    def validation_step(self, batch, index):
        self.log("loss", self.layer(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(Callback):
    """The words for each batch, and the handler of SIGTERM meanwhile."""

    def __init__(self):
        self.told, self.handlers = [], set()

    def setup(self, trainer, pl_module, stage):
        compat.leave_signals_alone(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.told.append((compat.is_accumulating(trainer), compat.validation_follows(trainer), trainer.global_step))
        self.handlers.add(signal.getsignal(signal.SIGTERM))


def test_a_batch_is_told_what_follows_it():
    watch, rows, before = Watch(), DataLoader(torch.ones(4, 1)), signal.getsignal(signal.SIGTERM)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, val_check_interval=2, num_sanity_val_steps=0,
        callbacks=[watch], **quiet,
    )  # fmt: skip
    trainer.fit(Line(), rows, rows)
    assert watch.told == [(True, False, 0), (False, True, 1), (True, False, 1), (False, True, 2)]
    assert watch.handlers == {before}


def test_sharded_parameters_are_made_by_ours_inside_only():
    def make(data, requires_grad=True):
        return nn.Parameter(data, requires_grad=False)

    with compat.fsdp_parameters_made_by(make):
        assert not _fsdp_param.nn.Parameter(torch.ones(1)).requires_grad and _fsdp_param.nn.Module is nn.Module
    assert _fsdp_param.nn is nn


def test_slices_given_to_fsdp_are_those_that_it_sends():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
        rows = torch.ones(2, 2)
        compat.give_slices(module, {module.weight: rows})
        held = {
            param._module_info.param_name: param for param in module._get_fsdp_state()._fsdp_param_group.fsdp_params
        }
    finally:
        dist.destroy_process_group()
    assert held["weight"]._sharded_param_data.data_ptr() == rows.data_ptr()
    assert held["bias"]._sharded_param_data.data_ptr() == module.bias.to_local().data_ptr()


def test_entered_collectives_are_counted_for_each_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group()
        before = compat.entered_collectives()
        for _ in range(2):
            dist.all_reduce(torch.ones(1))
        dist.broadcast(torch.ones(1), 0, group=group)
        entered = compat.entered_collectives()
        compat.store_of_ranks().set("word", "said")
        assert compat.store_of_ranks().get("word") == b"said"
    finally:
        dist.destroy_process_group()
    assert sorted(entered[name] - before[name] for name in entered) == [1, 2]


def test_what_ddp_and_a_scaler_are_told_is_where_they_look():
    module = nn.Linear(1, 1)
    compat.ignore_in_ddp(module, ["bias"])
    assert module._ddp_params_and_buffers_to_ignore == ["bias"]
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    assert optimizer._step_supports_amp_scaling
    compat.clip_unscaled_gradients(optimizer)
    assert not optimizer._step_supports_amp_scaling


def test_hydras_reader_reads_a_search_path(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").touch()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        path = GlobalHydra.instance().config_loader().get_search_path()
        loader = compat.config_loader_of(path)
    assert isinstance(loader, ConfigLoader) and "model" in loader.list_groups("")


def hidden_members_of(path):
    tree = ast.parse(path.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return used & HIDDEN


def test_nobody_else_uses_what_is_hidden():
    assert hidden_members_of(PACKAGE / "compat.py") == HIDDEN
    assert {path.name: used for path in PACKAGE.rglob("*.py") if (used := hidden_members_of(path))}.keys() == {
        "compat.py"
    }


def test_compiler_takes_what_it_is_set_to():
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    kept = dynamo.patch(recompile_limit=8, optimize_ddp=True), functorch.patch(ban_recompute_materialized_backward=True)
    with kept[0], kept[1]:
        compat.set_up_compiler(graphs=10_000, on_cuda=False)
        assert (dynamo.recompile_limit, dynamo.optimize_ddp) == (10_000, False)
        assert functorch.ban_recompute_materialized_backward is True
        compat.set_up_compiler(graphs=1, on_cuda=True)
        assert dynamo.recompile_limit == 10_000 and functorch.ban_recompute_materialized_backward is False


def test_length_that_varies_is_compiled_once():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    doubled = torch.compile(lambda x: 2 * x, backend=counting)
    for length in (5, 9, 2):
        x = torch.ones(length)
        compat.let_length_vary(x)
        assert doubled(x).shape == (length,)
    assert len(graphs) == 1
