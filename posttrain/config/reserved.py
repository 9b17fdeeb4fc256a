"""Trainer arguments that cannot be set, and what to do instead: each would be set twice, ignored, or do silent harm."""

_EVALUATION = (
    "held-out rows are judged by posttrain's own loop, in the precision of training, and no predictions are kept"
)
_PREPARED = "the data is prepared by posttrain; see data.*"
_RESUMES = "start the same command again and it resumes"
_FIXED_REFERENCE = "the reference stays what the stage starts from; a resumed run could not find another one again"

_ALWAYS = {
    "output_dir": "set output_dir and run_name",
    "run_name": "set run_name",
    "seed": "set seed",
    "bf16": "set precision=bf16",
    "fp16": "set precision=fp16",
    "use_cpu": "posttrain uses the accelerator that it finds; hide it with CUDA_VISIBLE_DEVICES=",
    "resume_from_checkpoint": _RESUMES,
    "restore_callback_states_from_checkpoint": _RESUMES,
    "ignore_data_skip": "it would train some rows twice after a resume",
    "enable_jit_checkpoint": "posttrain writes a checkpoint on SIGTERM by itself",
    "save_only_model": "a checkpoint without optimizer and generator states cannot be resumed exactly",
    "logging_nan_inf_filter": "it hides a loss that is not finite",
    "include_num_input_tokens_seen": "tokens are counted, without padding",
    "disable_tqdm": "set TQDM_DISABLE=1 in the environment",
    "auto_find_batch_size": "it would change the run behind your back; dry_run=true tells what stage.batch_size needs",
    "dataset_kwargs": _PREPARED,
    "dataset_num_proc": _PREPARED,
    "skip_prepare_dataset": _PREPARED,
    "dataset_text_field": "name the columns with data.columns.*",
    "truncation_mode": "set data.overlength",
    "shuffle_dataset": "rows are drawn in a new random order in each epoch; see trainer.train_sampling_strategy",
    "completion_only_loss": "loss is on the response alone",
    "assistant_only_loss": "loss is on every assistant turn, and on nothing else",
    "chat_template_path": "set model.chat_template_path",
    "model_init_kwargs": "set model.*",
    "trust_remote_code": "set model.trust_remote_code",
    "eos_token": "it is the tokenizer's, and the one that ends an assistant turn in its chat template",
    "pad_token": "it is the tokenizer's, or one that posttrain adds",
    "disable_dropout": "dropout is off: with it the first step would not start from the reference",
    "do_train": "leave it out",
    "do_eval": "leave it out; set trainer.eval_strategy",
    "do_predict": "leave it out",
    **dict.fromkeys(
        (
            *(
                "bf16_full_eval",
                "fp16_full_eval",
                "prediction_loss_only",
                "eval_accumulation_steps",
                "batch_eval_metrics",
            ),
            *("include_for_metrics", "eval_do_concat_batches", "eval_use_gather_object", "label_names", "eval_packing"),
        ),
        _EVALUATION,
    ),
    "accelerator_config": "rows are dealt to processes so that several give the result of one",
    "parallelism_config": "set it in the file given to accelerate launch --config_file",
    "local_rank": "accelerate launch sets it",
    "deepspeed": "start it with accelerate launch --config_file accelerate_configs/zero2.yaml",
    **dict.fromkeys(
        ("fsdp", "fsdp_config"), "start it with accelerate launch --config_file accelerate_configs/fsdp2.yaml"
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "push a finished model: python -m posttrain.export <its folder> push_to_hub=<owner/name>",
    ),
}

_BY_TEMPERATURE = "answers are sampled by temperature alone, as they are scored; else every probability ratio is wrong"
_OWN_ORDER = "prompts are in memory and shuffled anew in each pass by seed, in an order that a resumed run finds again"

_OF_STAGE = {
    "sft": {},
    "reward": {"label_smoothing_factor": "the Bradley–Terry loss has none"},
    "dpo": {
        "label_smoothing_factor": "set trainer.loss_type=[robust] and trainer.label_smoothing",
        "padding_free": "TRL's DPOTrainer pads, whatever is set (TRL 1.16)",
        **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _FIXED_REFERENCE),
    },
    "ppo": {
        "gradient_accumulation_steps": "it follows from stage.rollout_batch_size, num_mini_batches and batch_size",
        "beta": "set stage.kl_coef",
        "epsilon_high": "set stage.clip_ratio",
        **dict.fromkeys(("num_generations", "num_generations_eval"), "PPO takes one answer per prompt"),
        "steps_per_generation": "it follows from stage.rollout_batch_size and stage.batch_size",
        "reward_weights": "set stage.reward_weights",
        "reward_clip_range": "set stage.reward_clip",
        "normalize_advantages": "set stage.whiten_advantages",
        "mask_truncated_completions": "set stage.missing_eos_penalty",
        "use_transformers_paged": "set stage.use_transformers_continuous_batching",
        "remove_unused_columns": "reward functions see all columns",
        "label_smoothing_factor": "PPO's losses have none",
        "router_aux_loss_coef": "PPO's losses have none",
        "chat_template_kwargs": "prompts are rendered as for every other stage; set model.chat_template_path",
        "pad_to_multiple_of": "the answers of a rollout are padded to the longest",
        **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _FIXED_REFERENCE),
        **dict.fromkeys(
            (
                *("shuffle_dataset", "data_seed", "train_sampling_strategy", "length_column_name"),
                *("dataloader_drop_last", "dataloader_num_workers", "dataloader_prefetch_factor"),
                *("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order"),
                "dataloader_pin_memory",
            ),
            _OWN_ORDER,
        ),
        **dict.fromkeys(
            (
                *("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
                "vllm_structured_outputs_regex",
            ),
            _BY_TEMPERATURE,
        ),
        "neftune_noise_alpha": "with noise, log-probabilities in training are not those of generation",
    },
}

# options of TRL's DPO that only some of its losses read; the others would ignore them
LOSS_OPTIONS = {
    "label_smoothing": ("robust", "exo_pair", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}


def reserved_arguments(stage: str) -> dict[str, str]:
    """Argument -> what to do instead, of a stage."""
    return _ALWAYS | _OF_STAGE[stage]
