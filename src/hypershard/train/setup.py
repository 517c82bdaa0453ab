"""From the configuration to the parts of a training job, in one visible order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from ..adapters.lora import add_adapters
from ..adapters.nf4 import fuse_dequantisation
from ..adapters.nf4_ops import is_product
from ..adapters.nf4_weights import hold_in_nf4
from ..adapters.targets import adapter_specs, adapter_targets, trained_flops
from ..catalog.gpus import gpu_by_device_name
from ..checkpoint.manager import CheckpointManager
from ..config.checks import accumulation_steps, check_vocabulary, check_world
from ..config.schema import AdapterConfig, Config, LearningConfig, ModelConfig, OptimConfig
from ..data.open import Dataset
from ..distributed.env import Surroundings
from ..distributed.mesh import build_mesh
from ..distributed.process_group import World
from ..errors import ConfigError
from ..log import logger
from ..metrics.on_track import Forecast
from ..models.family import family_of, parameter_count
from ..optim.adamw import build_adamw
from ..optim.schedule import learning_rate
from ..parallel.apply import apply
from ..parallel.fsdp import ShardedModule
from ..units import format_count
from .attention import Attention, choose_attention
from .data import TrainingData, build_data, open_data
from .init_from import open_origin, tokenizer_of_run
from .loss import LanguageModel
from .preference import PreferenceModel
from .prompts import Prompts, choose_prompts
from .refuse import refuse_missing_bf16, refuse_other_kind, refuse_other_tokenizer
from .state import Progress, checkpoint_tensors
from .stop import Limits
from .tiers import build_checkpoints
from .weights import Base, first_weights

_MANY_IDLE_ROWS = 2  # an embedding with more rows per id of the tokenizer was made for another tokenizer


@dataclass(frozen=True)
class Job:
    """All parts of a training, built once; what changes during it is the weights, the optimizer and `Progress`."""

    world: World
    seed: int
    model: ModelConfig
    adapters: AdapterConfig
    learning: LearningConfig
    optim: OptimConfig
    module: LanguageModel
    attention: Attention
    sharded: ShardedModule
    parameters: Mapping[str, torch.Tensor]  # those that are trained
    base: Base | None  # what adapters stand beside; None: all weights are trained
    optimizer: torch.optim.Optimizer
    data: TrainingData
    batch_sizes: tuple[int, int]  # sequences per rank in training, in validation
    document_mask: bool
    prompts: Prompts | None  # what texts go on from at each validation; None: none are written
    tokenizer_path: Path | None
    eos_token_id: int | None
    accumulation: int
    samples_per_step: int
    tokens_per_step: int
    limits: Limits
    forecast: Forecast
    flops_per_token: float
    peak_flops_per_gpu: float | None
    checkpoints: CheckpointManager

    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained weights and moments as they are now. Asked for anew each time: at the first forward FSDP2
        replaces shards by padded (rows that do not divide evenly) or pinned ones, and what was taken before would be
        stale."""
        return checkpoint_tensors(self.parameters, self.optimizer)

    def last_step(self, progress: Progress) -> int:
        return self.limits.last_step_of(progress)

    def learning_rate(self, progress: Progress) -> float:
        """The rate of the step after `progress`."""
        course = progress.course
        optim = self.optim
        if course is not None:
            optim = dataclasses.replace(optim, warmup=course.warmup, plateau=course.plateau)
        return learning_rate(progress.step + 1, optim, last_step=self.last_step(progress))

    def data_position(self, progress: Progress) -> dict[str, int]:
        """Which samples come next, for the run's record: what `hypershard data ledger` reads."""
        lanes = self.data.feed.num_lanes
        return {"samples": progress.samples, "samples_per_step": self.samples_per_step, "num_lanes": lanes}

    def facts(self, progress: object) -> dict[str, Any]:
        """What a checkpoint says of itself besides its tensors. Collective where data are streamed."""
        return {
            **dataclasses.asdict(progress),  # type: ignore[call-overload]
            "seed": self.seed,
            "model": dataclasses.asdict(self.model),
            "adapters": dataclasses.asdict(self.adapters) if self.base else None,
            "base": dataclasses.asdict(self.base) if self.base else None,
            "learning": dataclasses.asdict(self.learning),
            **self.data.facts(),
            "samples_per_step": self.samples_per_step,
            "eos_token_id": self.eos_token_id,
        }


def build_job(
    config: Config,
    world: World,
    *,
    checkpoint_dir: Path,
    surroundings: Surroundings,
    alarm: Callable[[str], None],
    foresee: Callable[[ModelConfig, int], Forecast],
) -> Job:
    """Build every part. Raises a UserError for whatever the configuration asks that cannot be.

    `alarm` is told of what goes wrong beside the training. `foresee` is asked for a plan, by all ranks, before anything
    large is built: it is given the completed model and the number of steps, and refuses what does not fit.
    """
    check_world(config.parallel, world_size=world.size, local_world_size=world.ranks.local_world_size)
    refuse_missing_bf16(config, world.device)
    origin = open_origin(config, world)
    dataset = open_data(config, world, origin)
    refuse_other_kind(config, dataset)
    refuse_other_tokenizer(config, dataset, origin)
    model = _complete_model(config.model, dataset)
    family = family_of(model.model_type)
    accumulation = accumulation_steps(config.data, context_tokens=model.max_context_width, world_size=world.size)
    samples_per_step = config.data.train_batch_size * world.size * accumulation
    batch_sizes = (config.data.train_batch_size, config.data.val_batch_size or config.data.train_batch_size)
    context = model.max_context_width
    data = build_data(config, dataset, world, context_tokens=context, accumulation=accumulation)
    tokenizer_path, is_main = tokenizer_of_run(config, dataset, origin), world.ranks.is_main
    prompts = choose_prompts(config, dataset, tokenizer_path=tokenizer_path, context_tokens=context, is_main=is_main)
    limits = _limits(config, data.samples_per_epoch, samples_per_step, ends_at=surroundings.ends_at)
    forecast = foresee(model, limits.last_step)

    attention = choose_attention(config, model, world.device)
    module, sharded = build_module(config, model, attention, world, samples_per_step=samples_per_step)
    base = first_weights(config, model, module.hf_model, origin, num_replicas=sharded.num_replicas, device=world.device)
    parameters = {name: one for name, one in module.hf_model.named_parameters() if one.requires_grad}
    specs = adapter_specs(adapter_targets(model, config.adapters)) or family.parameters(model)
    decayed = {spec.name for spec in specs if spec.decay}
    optimizer = build_adamw(parameters, decayed=decayed, optim=config.optim)

    job = Job(
        world=world,
        seed=config.data.seed,
        model=model,
        adapters=config.adapters,
        learning=config.learning,
        optim=config.optim,
        module=module,
        attention=attention,
        sharded=sharded,
        parameters=parameters,
        base=base,
        optimizer=optimizer,
        data=data,
        batch_sizes=batch_sizes,
        document_mask=config.data.document_mask,
        prompts=prompts,
        tokenizer_path=tokenizer_path,
        eos_token_id=dataset.eos_token_id,
        accumulation=accumulation,
        samples_per_step=samples_per_step,
        tokens_per_step=samples_per_step * context,
        limits=limits,
        forecast=forecast,
        flops_per_token=_flops_per_token(config, model),
        peak_flops_per_gpu=_peak_flops(config, world.device),
        checkpoints=build_checkpoints(
            config.checkpoint, world, checkpoint_dir=checkpoint_dir, surroundings=surroundings, alarm=alarm
        ),
    )
    _tell(job)
    return job


def _tell(job: Job) -> None:
    """What is trained, over what, and how much of it, for people."""
    in_adapters = format_count(sum(parameter.numel() for parameter in job.parameters.values()))
    trained = f" and {in_adapters} in adapters, which are trained" if job.base else ""
    logger.info(
        f"{job.model.model_type} with {format_count(parameter_count(job.model))} parameters{trained}, "
        f"{job.sharded.strategy} over {job.world.size} x {device_name(job.world.device)}, "
        f"{job.attention.path} attention; a step is {job.samples_per_step} x {job.model.max_context_width} tokens"
    )
    last_step = job.limits.last_step
    passes = job.data.feed.passes(last_step * job.samples_per_step)
    logger.info(f"{last_step:,} steps are {format_count(last_step * job.tokens_per_step)} tokens, {passes}")


def _complete_model(model: ModelConfig, dataset: Dataset) -> ModelConfig:
    """Fill the model section's open values; the vocabulary is the tokenizer's unless given."""
    check_vocabulary(model, tokenizer_vocab_size=dataset.vocab_size)
    if model.vocab_size is not None and model.vocab_size > _MANY_IDLE_ROWS * dataset.vocab_size:
        logger.warning(
            f"the model has {model.vocab_size} ids and the data's tokenizer {dataset.vocab_size}: fine to try out a "
            f"model's shape; to train it, give its own --tokenizer"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or dataset.vocab_size)


def _limits(config: Config, num_samples: int | None, samples_per_step: int, *, ends_at: float | None) -> Limits:
    """The run's last step: max_steps, or as many as the epochs hold, whichever comes first.

    Raises ConfigError when only epochs could say so and a stream's length is not known.
    """
    train = config.train
    epochs = config.data.epochs or (1 if train.max_steps is None else None)
    if epochs is not None and num_samples is None:
        raise ConfigError(
            f"--dataset={config.data.dataset} is tokenised while training, so nobody knows how many steps "
            f"{'--epochs=' + str(epochs) if config.data.epochs else 'a pass over it'} takes; give --max_steps instead, "
            f"or set --streaming=0"
        )
    by_epochs = None if epochs is None or num_samples is None else max(1, epochs * num_samples // samples_per_step)
    last_step = min(steps for steps in (train.max_steps, by_epochs) if steps is not None)
    return Limits(
        last_step,
        None if train.max_hours is None else train.max_hours * 3600,
        ends_at,
        patience=train.early_stopping_patience,
        min_gain=train.early_stopping_min_gain,
    )


def build_module(
    config: Config, model: ModelConfig, attention: Attention, world: World, *, samples_per_step: int
) -> tuple[LanguageModel, ShardedModule]:
    """The sharded model, materialised but without values."""
    family = family_of(model.model_type)
    hf_model = family.build(model, path=attention.path)
    adapters = config.adapters
    if targets := adapter_targets(model, adapters):
        # Computing in bfloat16 rounds frozen weights anyway, so they are never held longer.
        frozen_dtype = torch.bfloat16 if config.parallel.bf16 else torch.float32
        add_adapters(hf_model, targets, adapters=adapters, frozen_dtype=frozen_dtype)
    if adapters.bnb_quant_type == "nf4":
        hold_in_nf4(hf_model, family.matrices(model), double_quant=adapters.bnb_double_quant)
        if config.parallel.compile and world.device.type == "cuda":
            fuse_dequantisation()
    family.add_router_loss(hf_model, scale_of_one_sequence=model.router_loss_weight / samples_per_step)
    parts = {"backbone": family.backbone(hf_model), "output_weight_owner": hf_model.get_output_embeddings()}
    if config.learning.objective == "dpo":
        module: LanguageModel = PreferenceModel(hf_model, **parts, learning=config.learning)
    else:
        module = LanguageModel(hf_model, **parts)
    mesh = build_mesh(
        config.parallel.sharding_strategy,
        world_size=world.size,
        hybrid_shard_degree=config.parallel.hybrid_shard_degree or world.ranks.local_world_size,
        device_type=world.device.type,
    )
    sharded = apply(
        module,
        family.blocks(hf_model),
        mesh=mesh,
        parallel=config.parallel,
        device=world.device,
        low_rank=adapters.lora_r,
        is_product=is_product,
    )
    register_fsdp_forward_method(module, "next_tokens")  # the root's weights are gathered for it as for a forward
    return module.train(), sharded


def _flops_per_token(config: Config, model: ModelConfig) -> float:
    has_reference = config.learning.objective == "dpo"
    context = model.max_context_width
    return trained_flops(model, config.adapters, context_tokens=context, has_reference=has_reference).total


def _peak_flops(config: Config, device: torch.device) -> float | None:
    """The GPU's dense bfloat16 peak in FLOP/s; None on a CPU, which has none to compare with unless one is given."""
    if config.train.peak_tflops_per_gpu:
        return config.train.peak_tflops_per_gpu * 1e12
    if device.type != "cuda":
        return None
    gpu = gpu_by_device_name(torch.cuda.get_device_name(device))
    if gpu is None or gpu.bf16_tflops is None:
        logger.warning(
            f"the catalog has no bfloat16 peak for {torch.cuda.get_device_name(device)}: no MFU is reported; "
            f"give --peak_tflops_per_gpu"
        )
        return None
    return gpu.bf16_tflops * 1e12


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
