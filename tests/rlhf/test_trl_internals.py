"""The private parts of TRL and transformers that PPO stands on: an upgrade that moves them fails here first.

Each line says what is relied upon; posttrain/rlhf/ppo.py says why.
"""

import ast
import dataclasses
import inspect
from importlib.metadata import version
from typing import Any

import pytest
from transformers import Trainer
from trl import DPOTrainer, RewardTrainer, RLOOConfig, RLOOTrainer, SFTTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import utils

SIGNATURES: dict[Any, list[str]] = {
    # overridden by PPOTrainer
    RLOOTrainer.get_train_dataloader: ["self"],
    RLOOTrainer._prepare_inputs: ["self", "generation_batch"],
    RLOOTrainer._tokenize_prompts: ["self", "prompts"],
    RLOOTrainer._generate: ["self", "prompts"],
    RLOOTrainer._generate_single_turn: ["self", "prompt_ids", "images", "multimodal_fields"],
    RLOOTrainer._generate_and_score_completions: ["self", "inputs"],
    RLOOTrainer._compute_loss: ["self", "model", "inputs"],
    Trainer.create_optimizer: ["self", "model"],
    Trainer._save: ["self", "output_dir", "state_dict"],
    Trainer.save_model: ["self", "output_dir", "_internal_call"],
    Trainer._load_from_checkpoint: ["self", "resume_from_checkpoint", "model"],
    Trainer._save_rng_state: ["self", "output_dir"],
    # called by it
    RLOOTrainer._calculate_rewards: ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    RLOOTrainer.log: ["self", "logs", "start_time"],
    utils.add_fused_lm_head: ["model", "temperature", "cast_lm_head_to_fp32", "outputs"],
    VLLMGeneration.generate: ["self", "prompts", "images", "num_generations", "profiler"],
    VLLMClient.generate: [
        *("self", "prompts", "features", "n", "repetition_penalty", "temperature", "top_p", "top_k", "min_p"),
        *("max_tokens", "logprobs", "structured_outputs_regex", "generation_kwargs"),
    ],
    # overridden for DPO, and called there
    DPOTrainer._precompute_ref_logps: ["self", "dataset", "name", "batch_size"],
    DPOTrainer.compute_ref_log_probs: ["self", "model", "inputs"],
    # overridden by SafeTrainer
    Trainer._maybe_log_save_evaluate: [
        *("self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
        "learning_rate",
    ],
    Trainer._save_checkpoint: ["self", "model", "trial"],
    Trainer._load_rng_state: ["self", "checkpoint"],
    Trainer._get_grad_norm: ["self", "model", "grad_norm"],
    Trainer._finalize_training: ["self", "trial", "num_train_samples", "start_time"],
    # called by it
    Trainer._evaluate: ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    Trainer._determine_best_metric: ["self", "metrics", "trial"],
}
# set by the training loop, and part of our checkpoints
SUMS = {"_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step"}
# set by RLOOTrainer and read by PPOTrainer
ATTRIBUTES = ["_step", "_metrics", "_logs", "_tokenizer", "eos_token_ids", "reward_weights", "reward_func_names"]
ATTRIBUTES += [
    "vllm_generation",
    "generation_config",
    "temperature",
    "ref_model",
    "use_vllm",
    "async_loop",
    "_has_async_funcs",
]
# of RLOOConfig
FIELDS = ["max_completion_length", "temperature", "generation_batch_size", "num_iterations", "epsilon", "beta"]
FIELDS += ["num_generations", "steps_per_generation", "disable_dropout", "remove_unused_columns", "reward_weights"]
FIELDS += ["vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"]
FIELDS += ["vllm_max_model_length", "pad_to_multiple_of", "use_vllm", "use_transformers_continuous_batching"]


@pytest.mark.parametrize("method", SIGNATURES, ids=lambda method: method.__qualname__)
def test_signatures(method: Any) -> None:
    assert list(inspect.signature(method).parameters) == SIGNATURES[method], f"trl {version('trl')}"


def written(kind: type) -> set[str]:
    nodes = ast.walk(ast.parse(inspect.getsource(kind)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


def test_attributes_are_set() -> None:
    assert written(VLLMGeneration) >= {"mode", "llm", "vllm_client", "logprobs", "generation_kwargs", "accelerator"}
    assert "fsdp_version" in written(DistributedBackend)
    assert written(VLLMGeneration) >= {"_dist", "tensor_parallel_size", "max_completion_length"}
    assert set(ATTRIBUTES) <= written(RLOOTrainer)
    assert written(Trainer) >= SUMS
    for kind in (SFTTrainer, RewardTrainer, DPOTrainer, RLOOTrainer):
        assert written(kind) >= {"_metrics", "_total_train_tokens"}


def test_a_resumed_run_takes_its_sums_up_after_they_are_reset_and_before_the_first_step() -> None:
    assert "self._tr_loss = torch.tensor(0.0" in inspect.getsource(Trainer._inner_training_loop)
    epoch = inspect.getsource(Trainer._run_epoch)
    assert epoch.count("self._load_rng_state(resume_from_checkpoint)") == 2
    assert epoch.rindex("self._load_rng_state(") < epoch.index("self.training_step(")


def test_fields_are_there() -> None:
    assert set(FIELDS) <= {field.name for field in dataclasses.fields(RLOOConfig)}


def test_the_loop_is_as_expected() -> None:
    """A step counts up after each forward pass; a generation's answers are split by `_prepare_inputs` alone."""
    step = inspect.getsource(RLOOTrainer.training_step)
    assert "self._step += 1" in step
    assert RLOOTrainer.loss_is_scaled_for_ga is False  # so that the Trainer divides by the accumulation
    assert "self._prepare_inputs(" in inspect.getsource(Trainer.training_step)
    assert "current_gradient_accumulation_steps" in inspect.getsource(Trainer.training_step)
    assert "_save_rng_state" in inspect.getsource(Trainer._save_checkpoint)


def test_the_fused_head_gives_what_is_read() -> None:
    assert {"log_probs", "entropy"} <= {field.name for field in dataclasses.fields(utils.FusedCausalLMOutput)}
