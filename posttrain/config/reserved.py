"""Trainer arguments that cannot be set, and what to do instead: each would be set twice, ignored, or do silent harm."""

_EVALUATION = (
    "held-out rows are judged by posttrain's own loop, in the precision of training, and no predictions are kept"
)
_PREPARED = "the data is prepared by posttrain; see data.*"
_RESUMES = "start the same command again and it resumes"
# evaluations without a better one that end the training: of the keys of `trainer` the one that is no argument of TRL's
PATIENCE = "early_stopping_patience"
ALWAYS = {
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
    "parallelism_config": "no stage trains with it",
    "local_rank": "accelerate sets it",
    "deepspeed": "set accelerate=zero2",
    **dict.fromkeys(("fsdp", "fsdp_config"), "set accelerate=fsdp2"),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "push a finished model: posttrain export <its folder> push_to_hub=<owner/name>",
    ),
}
