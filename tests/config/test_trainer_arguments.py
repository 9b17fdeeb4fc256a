"""No trainer argument is taken and then ignored: each is refused, changes what is learned, or does not touch it."""

import hashlib
from pathlib import Path

import pytest

from posttrain import configure, run_stage
from posttrain.config.reserved import ALWAYS
from posttrain.config.schema import renamed
from posttrain.config.stages import STAGES
from posttrain.config.trl_fields import trainer_arguments

# arguments that change what is learned, and a value that shows it
READ = {
    "max_steps": "5",
    "lr_scheduler_type": "cosine",
    "optim": "adafactor",
    "weight_decay": "0.5",
    "adam_beta1": "0.5",
    "adam_beta2": "0.5",
    "adam_epsilon": "1e-2",
    "max_grad_norm": "0.01",
}
BY_ROWS = {  # where the Trainer draws the rows
    "data_seed": "7",
    "train_sampling_strategy": "sequential",
    "gradient_accumulation_steps": "2",
    "neftune_noise_alpha": "5",
}
READ_BY = {
    "sft": READ | BY_ROWS | {"label_smoothing_factor": "0.2", "loss_type": "dft", "packing": "true"},
    "reward": READ | BY_ROWS | {"center_rewards_coefficient": "0.5"},
    "dpo": READ
    | BY_ROWS
    | {"loss_type": "[ipo]", "ld_alpha": "0.5", "f_divergence_type": "js_divergence", "use_weighting": "true"},
    "ppo": READ,
    "grpo": READ,
    "kto": READ
    | {name: value for name, value in BY_ROWS.items() if name != "train_sampling_strategy"}
    | {"loss_type": "apo_zero_unpaired"},
}
# what is computed faster or on less memory, kept, shown, or handed on to the library that is named in it
UNTOUCHED = """
    activation_checkpointing activation_checkpointing_kwargs activation_offloading gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    tf32 use_cache use_liger_kernel liger_kernel_config pad_to_multiple_of padding_free packing_strategy
    precompute_ref_log_probs precompute_ref_batch_size cache_implementation full_determinism
    average_tokens_across_devices per_device_eval_batch_size remove_unused_columns dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order length_column_name ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout ds3_gather_for_generation
    transformers_continuous_batching_config logging_strategy logging_steps logging_first_step log_on_each_node
    log_level log_level_replica report_to project trackio_space_id trackio_bucket_id trackio_static_space_id
    log_completions log_multimodal log_unique_prompts num_completions_to_print debug skip_memory_metrics
    hub_token eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps save_on_each_node
    save_total_limit load_best_model_at_end metric_for_best_model greater_is_better optim_args
    optim_target_modules lr_scheduler_kwargs loss_weights label_smoothing discopop_tau f_alpha_divergence_coef
    router_aux_loss_coef vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host
    vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
    vllm_tensor_parallel_size
""".split()  # noqa: SIM905, a list of a hundred words


@pytest.mark.parametrize("stage", STAGES)
def test_every_argument_is_known(stage: str) -> None:
    """One that TRL or transformers adds is to be looked at before anyone can set it."""
    spec = STAGES[stage]
    ours = renamed(spec.schema(name=stage))
    known = {*ours, *ALWAYS, *spec.reserved, *READ_BY[stage], *UNTOUCHED}
    assert set(trainer_arguments(*spec.trl_config)) - known == set()
    assert not set(READ_BY[stage]) & {*ours, *ALWAYS, *spec.reserved}


def learned(folder: Path, stage: str, *more: str) -> str:
    command = [f"recipes=quickstart/{stage}", "trainer.max_steps=6", "data.max_rows=60", f"output_dir={folder}"]
    if STAGES[stage].is_online:
        command += ["stage.rollout_batch_size=32", "stage.batch_size=16", "stage.max_new_tokens=12"]
        command += ["stage.reward_functions=[my_rewards.length]", "stage.eval_reward_functions=[]"]
    else:
        command += ["stage.batch_size=4"]
    done = run_stage(configure(*command, "stage.warmup_steps=0", *more))
    assert done is not None
    return hashlib.sha256((done.model / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_read_changes_what_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def length(completion_ids, **columns):\n    return [float(len(ids) % 5) for ids in completion_ids]\n"
    )
    plain = learned(tmp_path / "plain", stage)
    assert learned(tmp_path / "again", stage) == plain
    ignored = [
        name
        for name, value in READ_BY[stage].items()
        if learned(tmp_path / name, stage, f"trainer.{name}={value}") == plain
    ]
    assert not ignored
