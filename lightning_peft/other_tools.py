"""Names of our keys and options in HF's Trainer, TRL, PEFT, axolotl, LLaMA-Factory, unsloth, torchtune and litgpt."""

import difflib
import re
from collections.abc import Sequence

OURS = {
    "optimizer.lr": "lr learning_rate learningrate peak_lr max_lr lr_rate lrate",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.beta1": "adam_beta1 beta1 betas adam_betas",
    "optimizer.beta2": "adam_beta2 beta2",
    "optimizer.eps": "adam_epsilon adam_eps epsilon eps",
    "optimizer.lora_plus_ratio": "loraplus_lr_ratio lora_plus_ratio",
    "optimizer": "optim optimiser optimizer_type optimizer_name",
    "schedule": "lr_scheduler lr_scheduler_type scheduler scheduler_type lr_schedule",
    "schedule.warmup_steps": "warmup_steps warmup num_warmup_steps lr_warmup_steps lr_warmup_iters warmup_iters",
    "schedule.warmup_fraction": "warmup_ratio warmup_fraction warmup_proportion warmup_steps_ratio",
    "schedule.min_lr_ratio": "min_lr min_lr_ratio cosine_min_lr_ratio lr_min",
    "trainer.max_epochs": "epochs num_epochs num_train_epochs max_epochs n_epochs epoch n_epoch max_epoch train_epochs",
    "trainer.max_steps": "max_steps steps num_steps train_steps max_iters iters iterations total_steps max_train_steps "
    "num_train_steps",
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps grad_accum gradient_accumulation grad_accum_steps "
    "gradient_accumulation_iters accumulate_grad_batches accumulation_steps global_batch_size total_batch_size "
    "grad_acc "
    "grad_accumulation accum_iter accumulate accumulation",
    "trainer.gradient_clip_val": "max_grad_norm gradient_clipping grad_clip clip_grad_norm grad_norm_clip max_norm",
    "trainer.devices": "devices gpus num_gpus n_gpus nproc_per_node num_processes ngpus n_gpu gpu_ids",
    "trainer.num_nodes": "nodes num_nodes nnodes num_machines",
    "trainer.precision": "precision bf16 fp16 tf32 dtype torch_dtype mixed_precision compute_dtype "
    "bnb_4bit_compute_dtype half float16 bfloat16 float32 fp32 amp",
    "trainer.log_every_n_steps": "logging_steps log_every log_interval log_freq log_steps log_every_n_steps "
    "log_frequency",
    "trainer.max_time": "max_time time_limit",
    "data.micro_batch_size": "mbs batch_size micro_batch_size per_device_train_batch_size train_batch_size bs "
    "per_device_batch_size per_device_eval_batch_size eval_batch_size per_gpu_train_batch_size "
    "train_micro_batch_size_per_gpu mini_batch_size",
    "data.max_length": "max_prompt_length max_completion_length max_length max_seq_length max_seq_len sequence_len "
    "cutoff_len seq_len context_length max_len seq_length sequence_length model_max_length max_sequence_length "
    "context_window max_tokens seqlen block_size max_source_length max_target_length source_max_len target_max_len "
    "max_input_length model_length",
    "data.packing": "neat_packing padding_free eval_packing eval_sample_packing packing sample_packing pack packed "
    "dataset_packed",
    "data.validation_fraction": "val_set_size val_size validation_fraction test_size eval_split_ratio val_ratio "
    "validation_split validation_split_percentage eval_size dev_size val_split_fraction val_split val_frac",
    "data.max_validation_rows": "max_eval_samples max_validation_samples",
    "data.max_rows": "limit max_samples max_rows max_train_samples num_samples n_samples max_examples",
    "data=FILE": "dataset datasets dataset_path dataset_name train_file train_data train_path training_file data_path "
    "data_files train_dataset data_file data_dir dataset_dir hub_dataset pretraining_dataset",
    "data.validation_path": "validation_file validation_path eval_file eval_dataset val_file test_file val_dataset "
    "test_datasets validation_data val_data eval_data",
    "data.format": "dataset_format data_format",
    "data.prompt_column": "prompt_column prompt_field instruction_column input_field question_column field_instruction",
    "data.completion_column": "completion_column completion_field response_column answer_column output_column "
    "output_field field_output target_column",
    "data.text_column": "dataset_text_field text_column text_field",
    "data.messages_column": "field_messages messages_column",
    "data.hub_split": "train_split",
    "data.hub_validation_split": "valid_split eval_split",
    "data.shuffle_window": "buffer_size shuffle_buffer_size",
    "data.train_on": "response_template instruction_template train_on_inputs train_on_input completion_only_loss "
    "assistant_only_loss mask_prompt train_on_prompt train_on_responses_only completion_only "
    "train_on_completions roles_to_train",
    "data.ignore_columns": "remove_columns ignore_columns remove_unused_columns",
    "data.cache_dir": "tokenized_path dataset_prepared_path cache_dir overwrite_cache",
    "data.streaming": "streaming",
    "data.system_prompt": "system_prompt system default_system",
    "data.num_workers": "dataset_num_proc preprocessing_num_workers dataset_processes num_workers "
    "dataloader_num_workers",
    "seed": "random_seed data_seed random_state rng_seed seed_everything dataset_shuffle_seed",
    "objective": "pref_loss rl rlhf loss_type training_type stage",
    "objective.label_smoothing": "label_smoothing_factor label_smoothing cdpo_label_smoothing dpo_label_smoothing",
    "objective.beta": "beta dpo_beta pref_beta rl_beta",
    "objective.gamma": "simpo_gamma",
    "objective.sft_weight": "rpo_alpha pref_ftx sft_coef",
    "objective.centering": "center_rewards_coefficient",
    "objective.noise_alpha": "noisy_embedding_alpha neftune_noise_alpha noise_alpha neftune",
    "objective.teacher": "teacher teacher_model teacher_model_name_or_path",
    "objective.weight": "kd_alpha",
    "objective.temperature": "kd_temperature",
    "data.train_on_last_turn": "mask_history train_on_last_turn",
    "data.task": "task metric",
    "adapter.alpha": "alpha lora_alpha",
    "adapter.alpha_pattern": "alpha_pattern",
    "adapter.rank_pattern": "rank_pattern",
    "adapter.bias": "lora_bias bias",
    "adapter.dropout": "dropout lora_dropout",
    "adapter.init": "lora_init init init_lora_weights",
    "adapter.layers": "freeze_trainable_layers layers layers_to_transform lora_layers num_layers",
    "adapter.exclude_modules": "exclude_modules",
    "adapter.trainable_modules": "unfrozen_parameters apply_lora_to_output lora_head modules_to_save "
    "trainable_modules lora_modules_to_save additional_target",
    "adapter.init_from": "init_from lora_model_dir adapter_name_or_path lora_path",
    "adapter.rank_stabilized": "use_rslora rslora rank_stabilized peft_use_rslora",
    "target_modules": "apply_lora_to_mlp lora_query lora_key lora_value lora_projection lora_mlp layers_pattern "
    "target_regex lora_target_modules lora_target targets target lora_target_linear lora_attn_modules",
    "rank": "r lora_r lora_rank lora_dim",
    "method=qlora": "4bit qlora load_in_4bit nf4 quantization_bit bits use_4bit load_in_4_bit use_qlora "
    "bnb_4bit_quant_type",
    "method=dora": "dora use_dora peft_use_dora",
    "method=pissa": "pissa_init use_pissa",
    "quantization=int8": "load_in_8bit int8",
    "quantization": "quantization_type quantize_base quantization_config quantization_method quantize bnb_config "
    "bnb_4bit_use_double_quant",
    "method": "train_type tuner_type peft_type finetuning_type adapter_type peft_method use_peft use_lora lora peft "
    "peft_config lora_config",
    "model": "model_name_or_path base_model base_model_path model_name base_model_name model_id "
    "pretrained_model_name_or_path "
    "checkpoint_dir base_model_name_or_path model_id_or_path hf_model model_dir name_or_path",
    "model.path": "model_path path",
    "model.revision": "model_revision revision_of_model revision",
    "model.trust_remote_code": "trust_remote_code",
    "model.attention": "xformers_attention eager_attention s2_attention attn attn_implementation flash_attention "
    "attention use_flash_attention flash_attn attn_impl flash_attention_2 sdp_attention use_flash_attention_2",
    "hardware=cpu": "cpu",
    "hardware": "use_ipex device device_map accelerator use_cpu no_cuda",
    "run_dir": "project_name name output_dir out_dir out output save_dir output_path logging_dir output_folder "
    "save_path log_dir "
    "outdir work_dir default_root_dir project_dir",
    "resume=auto": "resume_from_checkpoint auto_resume_from_checkpoints resume_from resume_checkpoint ckpt_path "
    "checkpoint_path",
    "checkpoint.every_n_steps": "save_steps save_every saves_per_epoch save_interval save_strategy save_freq "
    "checkpointing_steps checkpoint_interval save_every_n_steps",
    "checkpoint.keep_last": "save_total_limit",
    "checkpoint.best_by": "metric_for_best_model greater_is_better",
    "early_stopping.patience": "early_stopping_patience patience early_stop",
    "early_stopping.min_delta": "early_stopping_threshold min_delta",
    "validation.max_new_tokens": "eval_max_new_tokens",
    "validation.samples": "eval_table_size generate_during_eval",
    "validation.every_n_steps": "eval_on_start eval eval_steps eval_every evals_per_epoch val_check_interval "
    "eval_interval eval_strategy evaluation_strategy eval_freq do_eval eval_every_n_steps validation_steps test_freq",
    "activation_checkpointing=offload": "enable_activation_offloading activation_offloading",
    "activation_checkpointing": "gradient_checkpointing_enable gradient_checkpointing grad_checkpointing "
    "use_gradient_checkpointing "
    "gradient_checkpointing_kwargs enable_activation_checkpointing",
    "logger": "enable_wandb enable_tensorboard metric_logger logger_name report_to wandb tracker log_with use_wandb "
    "tensorboard loggers",
    "logger.wandb.project": "wandb_project project",
    "logger.wandb.name": "wandb_name run_name wandb_run_id wandb_run_name",
    "logger.wandb.group": "wandb_group",
    "logger.wandb.tags": "wandb_tags",
    "logger.wandb.mode": "wandb_mode",
    "logger.wandb.entity": "wandb_entity",
    "strategy": "distributed_type sharded_ddp parallelism_config distributed deepspeed fsdp ddp parallel "
    "accelerator_strategy deepspeed_config "
    "fsdp_config zero_stage sharding_strategy ddp_find_unused_parameters",
    "trainer.profiler": "profiler",
    "model.rope_scaling.type": "rope_scaling",
    "adapter.experts": "target_parameters",
    "quantization.double_quantization": "double_quantization",
    "strategy.cpu_offload": "fsdp_cpu_offload",
    "strategy.tensor_parallel": "tensor_parallel_dim tensor_parallel_size",
    "objective.desirable_weight": "kto_chosen_weight desirable_weight",
    "objective.undesirable_weight": "kto_rejected_weight undesirable_weight",
    "data.sources": "mix_strategy interleave_probs dataset_mixture",
    "data.template_options": "enable_thinking chat_template_kwargs",
    "adapter.init=loftq": "loftq_config loftq use_loftq",
    "adapter.init=eva": "eva_config",
    "compile": "torch_compile_backend torch_compile_mode torch_compile",
    "dry_run": "dryrun debug",
    "sweep_dir": "sweep_path",
    "cluster.partition": "partition",
    "cluster.time": "time walltime",
    "cluster.gpus_per_node": "gres gpus_per_node",
}
"""Our word -> its names in HF's Trainer and PEFT, axolotl, LLaMA-Factory, torchtune and litgpt."""
BY_THEIRS = {theirs: ours for ours, names in OURS.items() for theirs in names.split()}
LISTS = (
    "target_modules",
    "adapter.exclude_modules",
    "adapter.trainable_modules",
    "data.ignore_columns",
    "data.train_on",
)
"""Our words that take a list."""
IN_SECTION = {
    "data.path": "data.train_path", "data.file": "data.train_path", "data.name": "data.hub_name",
    "data.split": "data.hub_split", "data.dataset": "data=FILE", "data.output": "data.completion_column",
    "dataset.path": "data.train_path", "dataset.name": "data.hub_name", "dataset.split": "data.hub_split",
    "model.id": "model.path", "model.model_name": "model.path", "model.dtype": "trainer.precision",
    "data.val_path": "data.validation_path", "optimizer.type": "optimizer", "schedule.name": "schedule",
    "schedule.type": "schedule", "optimizer.momentum": "optimizer.beta1",
    "eval.interval": "validation.every_n_steps", "eval.max_new_tokens": "validation.max_new_tokens",
}  # fmt: skip
"""Whole keys whose last part alone means something else."""

NOT_HERE = {
    "do_train": "leave it out: train trains",
    "_component_": "name the choice, as in model=org/name or optimizer=adamw",
    "class_path": "name the choice, as in model=org/name or optimizer=adamw",
    "log": "use logger=wandb or another of its options",
    "split": "data.hub_split is the split of a hub data set",
    "loss_watchdog_threshold": "guard.factor and guard.patience watch the loss",
    "loss_watchdog_patience": "guard.factor and guard.patience watch the loss",
    "max_new_tokens": "generate takes sampling.max_new_tokens, validations validation.max_new_tokens",
    "top_p": "generate takes it as sampling.top_p",
    "do_sample": "generate draws where sampling.temperature is above 0",
    "reward_model": "use objective=reward to train one",
    "reference_free": "use objective=simpo or objective=orpo, which have no reference",
    "precompute_ref_log_probs": "leave it out: the reference is the model without its adapter",
    "force_use_ref_model": "leave it out: the reference is the model without its adapter",
    "formatting_func": "give data.prompt_template, or rows in a format that is known",
    "column_mapping": "name the columns, as in data.prompt_column=question data.completion_column=answer",
    "prompt_style": "leave it out: the tokenizer's own chat template is used, and data.layout=raw does without",
    "tokenizer_name_or_path": "leave it out: the model's own is used",
    "tokenizer_path": "leave it out: the model's own is used",
    "processing_class": "leave it out: the model's own is used",
    "use_fast_tokenizer": "leave it out: the model's own is used",
    "use_chat_template": "leave it out: the tokenizer's own is used, and data.layout=raw does without",
    "use_liger": "leave it out: fused kernels are always on",
    "cut_cross_entropy": "leave it out: the loss never holds all logits",
    "flash_attn_cross_entropy": "leave it out: the loss never holds all logits",
    "unsloth_cross_entropy_loss": "leave it out: the loss never holds all logits",
    "lora_o_kernel": "leave it out: fused kernels are always on",
    "ddp_timeout": "leave it out: ranks that lose another one leave by themselves",
    "ddp_backend": "leave it out: it follows from the device",
    "ddp_bucket_cap_mb": "leave it out: it follows from the strategy",
    "master_port": "leave it out: train starts its ranks itself",
    "main_process_port": "leave it out: train starts its ranks itself",
    "machine_rank": "leave it out: submit starts the ranks of each node",
    "compute_environment": "leave it out: train starts its ranks itself",
    "low_cpu_mem_usage": "leave it out: weights are always read in parts",
    "split_batches": "leave it out: data.micro_batch_size is that of one rank",
    "dispatch_batches": "leave it out: each rank reads its own rows",
    "even_batches": "leave it out: no row is dropped, and none is repeated",
    "average_tokens_across_devices": "leave it out: the loss is always the mean over the tokens of all ranks",
    "initial_validation": "leave it out: evaluate scores the base beside the adapter",
    "final_validation": "leave it out: a run ends with a validation where there are rows",
    "data_collator": "leave it out: batches follow from data.packing",
    "dataset_kwargs": "leave it out: see --help data for what there is",
    "skip_prepare_dataset": "leave it out: rows are read and tokenised as needed",
    "ignore_index": "leave it out: what is not trained follows from data.train_on",
    "optim_args": "give the optimizer's own keys, as in optimizer.weight_decay=0.1",
    "lr_scheduler_kwargs": "give the schedule's own keys, as in schedule.min_lr_ratio=0.1",
    "decay_lr": "use schedule=constant, or another of its options",
    "lora_parameters": "use rank=8 adapter.alpha=16 adapter.dropout=0.05",
    "adapter_path": "adapter.init_from=FOLDER continues an adapter",
    "use_vllm": "leave it out: no answer is drawn while it trains",
    "num_generations": "lightning-peft pairs RUN samples=8 draws answers, for objective=dpo",
    "save_merged": "use lightning-peft merge RUN output=FOLDER after training",
    "use_swanlab": "use logger=wandb, mlflow, trackio, comet or tensorboard",
    "overwrite_output_dir": "a used run_dir is an error; give another one, or resume=auto",
    "load_best_model_at_end": "leave it out: adapter_best/ is kept wherever validation runs",
    "push": "use lightning-peft push RUN repo=NAME after training",
    "push_to_hub": "use lightning-peft push RUN repo=NAME after training",
    "hub_model_id": "use lightning-peft push RUN repo=NAME after training",
    "group_by_length": "leave it out: rows are packed, or batched by length with data.packing=false",
    "chat_template": "leave it out: the tokenizer's own is used, and data.layout=raw does without",
    "template": "leave it out: the tokenizer's own chat template is used, and data.layout=raw does without",
    "tokenizer": "leave it out: the model's own is used",
    "tokenizer_name": "leave it out: the model's own is used",
    "tokenizer_type": "leave it out: the model's own is used",
    "use_unsloth": "leave it out: fused kernels are always on",
    "unsloth": "leave it out: fused kernels are always on",
    "liger_kernel": "leave it out: fused kernels are always on",
    "use_liger_kernel": "leave it out: fused kernels are always on",
    "merge": "use lightning-peft merge RUN output=FOLDER after training",
    "merge_weights": "use lightning-peft merge RUN output=FOLDER after training",
    "merge_lora": "use lightning-peft merge RUN output=FOLDER after training",
    "do_predict": "use lightning-peft evaluate RUN after training",
    "predict_with_generate": "use lightning-peft evaluate RUN after training",
    "use_cache": "leave it out: it follows from training or generating",
    "pad_to_sequence_len": "leave it out: packed rows are always full",
    "pad_token": "leave it out: it follows from the tokenizer",
    "special_tokens": "leave it out, or give model.new_tokens=[...]",
    "fan_in_fan_out": "leave it out: it follows from the layer",
    "config": "name the file itself, as in lightning-peft train my.yaml",
    "config_file": "name the file itself, as in lightning-peft train my.yaml",
    "cfg": "use lightning-peft config train, which prints the composed config",
    "verbose": "leave it out: each message is printed once",
    "quiet": "leave it out: each message is printed once",
    "sweep_dir": "train -m takes run_dir=FOLDER for it, and submit -m sweep_dir=FOLDER",
    **dict.fromkeys(
        ("sequence_parallel_size", "context_parallel_size", "cp_size"),
        "a row stays on one rank; activation_checkpointing=offload makes room for long ones",
    ),
    **{
        f"{prefix}{name}": f"submit takes it as cluster.sbatch=['--{name}=VALUE']"
        for name in ("account", "qos", "mem", "constraint", "reservation", "nodelist", "exclude")
        for prefix in ("", "cluster.")
    },
    "cluster.memory": "submit takes it as cluster.sbatch=['--mem=VALUE']",
    "local_rank": "leave it out: train starts its ranks itself",
    "task_type": "leave it out: every model here is a causal language model",
    "model_type": "leave it out: it follows from the model's config.json",
    "inference_mode": "leave it out: train trains",
    "auto_find_batch_size": "lightning-peft estimate says what fits; give data.micro_batch_size",
    "group_by_modality_length": "leave it out: rows are packed",
    "eval_delay": "validation.at_steps=[...] names the steps",
    "max_steps_per_epoch": "use trainer.max_steps, which counts over all epochs",
    "trainable_token_indices": "give model.new_tokens=[...]: embeddings of new tokens train",
    "resize_vocab": "leave it out: model.new_tokens=[...] adds rows",
    "overrides_of_model_config": "change the model's config.json, in a folder of your own",
    "rope_theta": "change the model's config.json, in a folder of your own",
    "ref_model": "leave it out: the reference is the model without its adapter",
    "sync_ref_model": "leave it out: the reference is the model without its adapter",
    "create_new_adapter": "merge the first adapter, and give model=MERGED",
    "export_dir": "use lightning-peft merge RUN output=FOLDER after training",
    "train.tie_embeddings": "leave it out: it follows from the model",
    "tie_embeddings": "leave it out: it follows from the model",
    "access_token": "run hf auth login, or set HF_TOKEN",
    "hub_token": "run hf auth login, or set HF_TOKEN",
    "hub_strategy": "use lightning-peft push RUN repo=NAME after training",
    "hub_private_repo": "use lightning-peft push RUN repo=NAME after training",
    "plot_loss": "use lightning-peft report RUN after training",
    "compute_accuracy": "validation.metrics=[...] scores answers while it trains",
    "infer_backend": "serve takes it as serve.engine",
    "ignore_data_skip": "leave it out: a resumed run goes on at its very next row",
    "save_only_model": "leave it out: adapter/ holds the adapter, checkpoints/ what a resume needs",
    "save_adapter_weights_only": "leave it out: adapter/ holds the adapter, checkpoints/ what a resume needs",
    "save_safetensors": "leave it out: adapters are always safetensors",
    "full_determinism": "leave it out: a run is a function of its seed",
    "logging_first_step": "leave it out: the first step is logged",
    "log_peak_memory_stats": "leave it out: the peak is in every line and in result.json",
    "skip_memory_metrics": "leave it out: measuring memory costs nothing",
    "include_num_input_tokens_seen": "leave it out: metrics.csv counts tokens",
    "include_tokens_per_second": "leave it out: metrics.csv has it",
    "include_effective_tokens_per_second": "leave it out: metrics.csv has it",
    "disable_tqdm": "leave it out: a log file gets lines in place of the bar",
    "shuffle": "leave it out: training rows are always shuffled, by seed",
    "shuffle_dataset": "leave it out: training rows are always shuffled, by seed",
    "shuffle_merged_datasets": "leave it out: training rows are always shuffled, by seed",
    "dataloader_drop_last": "leave it out: no row is dropped",
    "dataloader_pin_memory": "leave it out: it follows from the device",
    "bf16_full_eval": "leave it out: validation runs in trainer.precision",
    "prediction_loss_only": "leave it out: validation.metrics=[...] asks for more than the loss",
    "eos_token": "leave it out: end tokens follow from the tokenizer and its template",
    "lora_mlp_kernel": "leave it out: fused kernels are always on",
    "lora_qkv_kernel": "leave it out: fused kernels are always on",
    "enable_liger_kernel": "leave it out: fused kernels are always on",
    "use_galore": "use method=lora or method=qlora, which need less memory",
    "use_badam": "use method=lora or method=qlora, which need less memory",
    "adafactor": "use optimizer=adamw_8bit",
    "optimizer_in_bwd": "use optimizer=adamw_8bit or paged_adamw_8bit where states need too much memory",
    "relora_steps": "merge the adapter, and train another one on model=MERGED",
    "wandb_watch": "use health.every_n_steps, which logs the adapters' norms",
    "wandb_log_model": "leave it out: the adapter is the W&B run's artifact",
    "plugins": "give imports=[MODULE]",
    "checkpointer": "leave it out, or see checkpoint.every_n_steps",
    "strict": "leave it out: an unknown key is always an error",
}
"""Keys without a counterpart -> the thing to do instead."""

OPTIONS = {
    "method": {
        "full": "full_finetune full_finetuning fft full_parameter full_ft finetune sft_full",
        "lora_plus": "lora+ loraplus", "lora_fa": "lorafa", "ia3": "ia3 (ia)3 (ia)^3", "rslora": "rs_lora",
        "molf_e": "molfe", "qlora": "qlora_4bit 4bit bnb_4bit lora_4bit", "miss": "bone",
        "lora": "peft",
    },
    "logger": {"none": "null false off no 0", "tensorboard": "tb", "wandb": "true weights_and_biases", "csv": "all"},
    "optimizer": {
        "adamw": "adam adamw_torch adamw_torch_fused adamw_hf adamw_fused",
        "adamw_8bit": "adamw_bnb_8bit adam8bit adamw8bit adamw_torch_8bit", "paged_adamw_32bit": "paged_adamw",
    },
    "schedule": {
        "cosine": "cosine_annealing cosine_with_min_lr cosine_with_warmup cosine_with_restarts onecycle one_cycle",
        "constant": "none constant_with_warmup null", "wsd": "warmup_stable_decay",
        "linear": "linear_with_warmup polynomial",
    },
    "strategy": {
        "fsdp": "deepspeed zero zero1 zero2 zero3 deepspeed_stage_2 deepspeed_stage_3 full_shard fsdp2",
        "ddp": "dp data_parallel ddp_find_unused_parameters_true ddp_spawn ddp_notebook",
        "single": "auto none null single_device",
    },
    "hardware": {
        "auto": "gpu cuda cuda:0 none null any", "cpu": "mps tpu laptop",
        "gpu_24gb": "24gb a10 a10g l4 4090 3090 rtx4090 rtx3090",
        "gpu_48gb": "48gb l40 l40s a6000 a40", "gpu_80gb": "80gb a100 h100 h200 a100_80gb h100_80gb",
        "gpu_80gb_x8": "8xa100 8xh100 a100x8 h100x8 8x_h100 8x_a100", "gpu_24gb_x2": "2x4090 2x3090 4090x2 3090x2",
    },
    "quantization": {
        "nf4": "4bit 4 true int4 bnb bnb_4bit bitsandbytes nf4_double", "int8": "8bit 8 bnb_8bit",
        "none": "null false no off fp16 bf16",
    },
    "objective": {
        "sft": "pretrain cpt pt supervised instruct clm completion null none",
        "dpo": "rlhf preference", "distill": "kd distillation gkd",
        "reward": "rm reward_model reward_modeling bradley_terry", "simpo": "cpo",
    },
    "target_modules": {"all_linear": "all linear all_linear_layers", "attention": "attn", "query_value": "qv q_v"},
    "data": {"alpaca": "alpaca_cleaned alpaca_en alpaca_gpt4", "openassistant": "oasst oasst1", "flan_v2": "flan",
             "jsonl": "csv json parquet file files local custom", "hub": "hf huggingface"},
    "cluster": {"slurm": "sbatch srun", "kubernetes": "k8s", "skypilot": "sky"},
}  # fmt: skip
"""Group -> our option -> its names elsewhere, or those of options that it is the nearest to."""
BY_THEIR_OPTION = {
    (group, theirs): ours
    for group, options in OPTIONS.items()
    for ours, names in options.items()
    for theirs in names.split()
}
OF_ANOTHER_GROUP = {
    **{("method", name): f"objective={name}" for name in ("sft", "dpo", "ipo", "kto", "orpo", "simpo", "distill")},
    ("objective", "lora"): "method=lora", ("objective", "full"): "method=full", ("model", "lora"): "method=lora",
    **{
        ("objective", name): "objective=dpo, on answers that lightning-peft pairs RUN draws"
        for name in ("grpo", "ppo", "rloo", "reinforce", "online_dpo")
    },
    **{
        ("quantization", name): "model=org/name of a checkpoint that is published so"
        for name in ("gptq", "awq", "fp8", "mxfp4", "compressed_tensors")
    },
    ("strategy", "tp"): "strategy.tensor_parallel=2 with strategy=fsdp",
    ("optimizer", "adafactor"): "optimizer=adamw_8bit",
    ("strategy", "qlora"): "method=qlora", ("quantization", "qlora"): "method=qlora",
    ("cluster", "local"): "submit -m, or train without it",
}  # fmt: skip
"""An option typed for a group that has not got it -> our word for it."""

COMMANDS = {
    "train": "finetune fine-tune fine_tune finetuning tune sft dpo fit run train-model lora qlora full finetune_lora "
    "finetune_full kto orpo start resume continue pretrain",
    "evaluate": "eval score test benchmark bench lm_eval lm-eval validate",
    "generate": "chat infer inference predict ask complete run-inference talk prompt",
    "merge": "merge_lora merge-lora merge_adapter fuse merge-weights merge_weights",
    "export": "gguf quantize convert-to-gguf ollama",
    "serve": "api webui web server deploy gradio",
    "push": "upload publish push_to_hub",
    "data": "preprocess dataset preview tokenize prepare_dataset",
    "models": "list ls download model",
    "report": "plot dashboard show",
    "submit": "sbatch slurm srun launch",
    "config": "cfg validate_config",
    "estimate": "memory plan",
    "--version": "version -V -v --v",
    "--help": "help --h -help man usage",
}
"""Our command -> its names in other tools."""
BY_THEIR_COMMAND = {theirs: ours for ours, names in COMMANDS.items() for theirs in names.split()}


def plain_name(name: str) -> str:
    """Return a name as people mean it: in lower case, with one kind of separator."""
    return re.sub(r"[-_. ]+", "_", name.strip().strip("'\"").lower())


def ours(key: str) -> str | None:
    """Return our word for a key of another tool; None for an unknown key."""
    whole = key.lstrip("+~-").replace("-", "_").lower()
    leaf = whole.rpartition(".")[2]
    return IN_SECTION.get(whole) or BY_THEIRS.get(whole) or BY_THEIRS.get(leaf)


def what_instead(key: str) -> str | None:
    """Return what to do instead of giving a key that has no counterpart here; None for other keys."""
    return NOT_HERE.get(key.lstrip("+~-").replace("-", "_").lower())


def option_meant(group: str, name: str, options: Sequence[str]) -> str | None:
    """Return what is meant by a name that is no option of a group, as it is typed; None where no option is near."""
    plain = plain_name(name)
    by_plain_name = {plain_name(option): option for option in options} | {
        plain_name(option).replace("_", ""): option for option in options
    }
    known = BY_THEIR_OPTION.get((group, name.lower())) or BY_THEIR_OPTION.get((group, plain))
    known = known or by_plain_name.get(plain) or by_plain_name.get(plain.replace("_", ""))
    if known is None and (elsewhere := OF_ANOTHER_GROUP.get((group, plain))) is not None:
        return elsewhere
    if known is None and group == "recipe":
        named = [option for option in options if option.rpartition("/")[2] == plain]
        known = next(iter(sorted(named, key=lambda option: not option.startswith("lora/"))), None)
    if known is None and plain != "null" and group != "rank":
        begun = [option for option in options if len(plain) > 4 and option.startswith(plain)]
        mixed = [option for option in options if sorted(option) == sorted(plain)]
        near = difflib.get_close_matches(plain, options, n=1, cutoff=0.8)
        known = next(iter([*near, *mixed, *(begun if len(begun) == 1 else [])]), None)
    return f"{group}={known}" if known is not None else None
