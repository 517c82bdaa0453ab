"""Rules between settings: what single-value limits cannot say. Each names the flag to change.

A family's own rules (heads, experts, rope) live in that family's file under models/.
"""

from __future__ import annotations

import dataclasses

from ..errors import ConfigError
from .schema import AdapterConfig, Config, DataConfig, LearningConfig, ModelConfig, ParallelConfig, TrainConfig

# What torch's flash kernel takes (aten/src/ATen/native/transformers/cuda: flash_attn/flash_api.cpp, sdp_utils.cpp).
# Some GPUs take 256; 192 is what backward takes on all, the A10G's and L4's generations among them.
_WIDEST_FLASH_HEAD = 192
_FLASH_HEAD_MULTIPLE = 8


def check(config: Config) -> None:
    """Refuse combinations that are wrong whatever the number of GPUs. Raises ConfigError."""
    optim, parallel, train = config.optim, config.parallel, config.train
    checkpoint, data = config.checkpoint, config.data
    if optim.min_lr > optim.lr:
        raise ConfigError(f"--min_lr={optim.min_lr} is above --lr={optim.lr}; lower --min_lr or raise --lr")
    if optim.lr_decay_style == "exponential" and optim.min_lr == 0:
        raise ConfigError("--lr_decay_style=exponential never reaches 0; give a positive --min_lr")
    if optim.lr_decay_style == "wsd" and not 0 < optim.plateau < 1:
        raise ConfigError("--lr_decay_style=wsd needs --plateau, the share of steps held at the peak (0.8 is usual)")
    if optim.lr_decay_style not in ("wsd", "plateau") and optim.plateau:
        raise ConfigError(f"--plateau={optim.plateau} acts only with --lr_decay_style=plateau or wsd")
    if optim.warmup + optim.plateau > 1:
        raise ConfigError(f"--warmup={optim.warmup} and --plateau={optim.plateau} add up to more than 1")
    if not parallel.limit_all_gathers:
        raise ConfigError("--limit_all_gathers=0: FSDP2 always bounds the weights gathered ahead; drop the flag")
    if parallel.activation_loading_horizon is not None:
        raise ConfigError(
            "--activation_loading_horizon: offloaded activations are fetched when backward asks for them, "
            "so there is no horizon to set; drop the flag"
        )
    if parallel.hybrid_shard_degree is not None and parallel.sharding_strategy != "hybrid":
        raise ConfigError(
            f"--hybrid_shard_degree acts only with --sharding_strategy=hybrid, found {parallel.sharding_strategy}"
        )
    if parallel.attention == "varlen" and config.model.attn_pdrop:
        raise ConfigError(
            f"--attention=varlen has no dropout on attention weights, found --attn_pdrop={config.model.attn_pdrop}; "
            f"choose --attention=dense or --attn_pdrop=0"
        )
    if data.global_batch_tokens is not None and data.gradient_accumulation_steps is not None:
        raise ConfigError("--global_batch_tokens works out gradient_accumulation_steps; give one of the two")
    if checkpoint.hyperpod_memory_url is not None and not checkpoint.in_memory_checkpointing_freq:
        raise ConfigError(
            "--hyperpod_memory_url takes memory checkpoints, and --in_memory_checkpointing_freq turns them off; "
            "drop one of the two"
        )
    if checkpoint.s3_tier_base_path is not None and not checkpoint.s3_tier_base_path.startswith("s3://"):
        raise ConfigError(f"--s3_tier_base_path={checkpoint.s3_tier_base_path}: expected s3://bucket/prefix")
    places = (checkpoint.resume_from_checkpoint, checkpoint.checkpoint_dir, config.report.run_dir)
    if train.init_from == "resume" and not any(places):
        raise ConfigError("--init_from=resume: say from where, by --resume_from_checkpoint DIR or --run_dir RUN")
    if train.eval_only and train.init_from == "scratch" and checkpoint.resume_from_checkpoint is None:
        raise ConfigError(
            "--eval_only=1 would validate untrained weights; add --resume_from_checkpoint, or --init_from with a "
            "model's folder"
        )
    _check_adapters(config)
    _check_best(config)
    _check_texts(config.train)
    _check_objective(config)
    if train.max_steps is not None and train.max_steps < (optim.lr_decay_iters or 0) and optim.lr_decay_style == "wsd":
        raise ConfigError(
            f"--lr_decay_iters={optim.lr_decay_iters} ends after --max_steps={train.max_steps}, which would cut the "
            f"decay of wsd; lower --lr_decay_iters"
        )


def _check_best(config: Config) -> None:
    """What acts on validations needs some, and what is kept needs a place."""
    train, checkpoint = config.train, config.checkpoint
    if train.early_stopping_min_gain and train.early_stopping_patience is None and not checkpoint.keep_best:
        raise ConfigError("--early_stopping_min_gain acts only with --early_stopping_patience or --keep_best")
    wanted = [
        flag
        for flag, is_given in (
            ("--early_stopping_patience", train.early_stopping_patience is not None),
            ("--keep_best", checkpoint.keep_best),
        )
        if is_given
    ]
    if wanted and train.validation_freq is None:
        raise ConfigError(f"{wanted[0]} acts on validations, and there is only one, at the end; give --validation_freq")
    in_bucket = checkpoint.s3_tier_base_path is not None and checkpoint.s3_checkpointing_freq != 0
    if checkpoint.keep_best and checkpoint.checkpoint_freq == 0 and not in_bucket:
        raise ConfigError(
            "--keep_best=1 keeps a checkpoint in --checkpoint_dir or S3, and both are off; drop --checkpoint_freq=0"
        )


def _check_texts(train: TrainConfig) -> None:
    """What says how texts are written needs some that are."""
    for name in ("validation_prompts", "validation_text_tokens") if not train.validation_texts else ():
        if getattr(train, name) != getattr(TrainConfig(), name):
            raise ConfigError(
                f"--{name}={getattr(train, name)} acts only on texts written at validations, and --validation_texts=0 "
                f"asks for none; give --validation_texts (4 is usual) or drop the flag"
            )


def check_data_is_named(config: Config) -> None:
    """Refuse to train on conversations or pairs where none are named: the embedded corpus is plain text.

    For what starts a training; a plan needs no data. Raises ConfigError.
    """
    data, wanted = config.data_read, {"chat": "conversations", "preference": "pairs of answers"}
    if data.data_kind in wanted and data.dataset == DataConfig().dataset:
        raise ConfigError(
            f"--data_kind={data.data_kind}: found no --dataset, and the embedded corpus is plain text; give --dataset "
            f"with {wanted[data.data_kind]} (files, an s3:// URI or a hub name), or a SageMaker job --channel "
            f"train=s3://…"
        )


def _check_adapters(config: Config) -> None:
    adapters = config.adapters
    if not adapters.lora_r:
        for field in dataclasses.fields(AdapterConfig):
            if getattr(adapters, field.name) != field.default:
                raise ConfigError(
                    f"--{field.name}={getattr(adapters, field.name)} acts only with adapters, and --lora_r=0 makes "
                    f"none; give --lora_r (16 is usual) or drop the flag"
                )
    elif config.train.init_from == "resume":
        raise ConfigError(
            "--init_from=resume: a checkpoint of --lora_r holds the adapters alone; give the folder of the model they "
            "were trained beside as --init_from, and --resume_from_checkpoint"
        )
    if adapters.bnb_quant_type == "none" and not adapters.bnb_double_quant:
        raise ConfigError(
            "--bnb_double_quant=0 acts only on weights in nf4, found --bnb_quant_type=none; give nf4 or drop the flag"
        )
    if adapters.lora_dropout == 1:
        raise ConfigError("--lora_dropout=1 leaves the adapters no input; choose less, 0.05 or 0.1 are usual")


def _check_objective(config: Config) -> None:
    """Preferences are learnt from pairs of answers, kept together, beside weights that stay what they are."""
    learning, data = config.learning, config.data
    if learning.objective != "dpo":
        for field in dataclasses.fields(LearningConfig):
            if getattr(learning, field.name) != field.default:
                raise ConfigError(
                    f"--{field.name}={getattr(learning, field.name)} acts only with --objective=dpo; drop the flag"
                )
        if data.data_kind == "preference":
            raise ConfigError("--data_kind=preference: pairs of answers are for --objective=dpo; give that too")
        return
    if not config.adapters.lora_r:
        raise ConfigError(
            "--objective=dpo compares with the model as it was, which is the one without its adapters; give --lora_r "
            "(16 is usual)"
        )
    if config.adapters.lora_init_from is not None:
        raise ConfigError(
            "--objective=dpo starts from adapters that change nothing: with --lora_init_from it would be compared with "
            "the model before these; merge them first (hypershard checkpoint export) and give the result as --init_from"
        )
    refused = (
        ("data_kind", ("auto", "preference")),
        ("packing", (None, "best_fit", "none")),
        ("long_documents", (None, "drop")),
        ("document_mask", (True,)),
        ("streaming", (None, False)),
    )
    for name, allowed in refused:
        if getattr(data, name) not in allowed:
            raise ConfigError(
                f"--{name}={getattr(data, name)}: --objective=dpo takes pairs of whole answers, side by side, "
                f"which do not see each other; drop the flag"
            )


def check_world(parallel: ParallelConfig, *, world_size: int, local_world_size: int) -> None:
    """Refuse what does not go with this number of ranks. Raises ConfigError."""
    if parallel.sharding_strategy == "hybrid":
        degree = parallel.hybrid_shard_degree or local_world_size
        if world_size % degree:
            raise ConfigError(
                f"--hybrid_shard_degree={degree} does not divide the {world_size} ranks of this job; "
                f"choose one of {[d for d in range(1, world_size + 1) if world_size % d == 0]}"
            )


def flash_obstacle(model: ModelConfig, parallel: ParallelConfig) -> str | None:
    """What a GPU's flash kernel cannot do of this run, in words; None where it serves. `model` is complete."""
    if not parallel.bf16:
        return "the flash kernel computes in bfloat16, found --bf16=0"
    width = model.head_width or 0
    if width % _FLASH_HEAD_MULTIPLE or width > _WIDEST_FLASH_HEAD:
        return (
            f"the flash kernel takes heads whose width is a multiple of {_FLASH_HEAD_MULTIPLE} up to "
            f"{_WIDEST_FLASH_HEAD}, found --head_width={width}"
        )
    return None


def check_attention(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse --attention=varlen on GPUs whose kernel does not serve. `model` is complete. Raises ConfigError."""
    obstacle = flash_obstacle(model, parallel)
    if parallel.attention == "varlen" and obstacle is not None:
        raise ConfigError(f"--attention=varlen: {obstacle}; choose --attention=dense or auto")


def check_vocabulary(model: ModelConfig, *, tokenizer_vocab_size: int) -> None:
    """Refuse an embedding with fewer rows than the tokenizer has ids. Raises ConfigError."""
    if model.vocab_size is not None and model.vocab_size < tokenizer_vocab_size:
        raise ConfigError(
            f"--vocab_size={model.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size} ids; "
            f"raise --vocab_size or choose another --tokenizer"
        )


def accumulation_steps(data: DataConfig, *, context_tokens: int, world_size: int) -> int:
    """Micro-steps per optimizer step. Raises ConfigError when global_batch_tokens is no whole number of them."""
    if data.global_batch_tokens is None:
        return data.gradient_accumulation_steps or 1
    tokens = data.train_batch_size * context_tokens * world_size
    if data.global_batch_tokens % tokens:
        raise ConfigError(
            f"--global_batch_tokens={data.global_batch_tokens} is no multiple of the {tokens} tokens of one micro-step "
            f"(train_batch_size {data.train_batch_size} x context {context_tokens} x {world_size} ranks); "
            f"change --global_batch_tokens or --train_batch_size"
        )
    return data.global_batch_tokens // tokens
