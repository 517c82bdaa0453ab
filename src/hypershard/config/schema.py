"""Every setting once: its name (= flag = YAML key), default, meaning and limits.

Sections are flat and frozen; names are unique over all sections, so a YAML file needs no nesting.
`None` as a default means "worked out from other settings", and the help says from which.
Nothing outside this file knows a default.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("llama_v2", "llama_v3", "mistral", "mixtral", "qwen2", "gpt2", "llama4")


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    aliases: dict[str, str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    unit: str = "",
    value_when_bare: str | None = None,
    words: tuple[str, ...] = (),
) -> Any:
    """Declare one setting.

    `choices` limits a text to these words, `aliases` maps other accepted spellings to one of them,
    `minimum`/`maximum` are inclusive, `value_when_bare` is what `--flag` without a value means, `words` are texts
    with a meaning of their own, in place of a number or another text.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "aliases": aliases or {},
            "minimum": minimum,
            "maximum": maximum,
            "unit": unit,
            "value_when_bare": value_when_bare,
            "words": words,
        },
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model's shape. A file in model_configs/ (--model NAME) fills it; flags change single values."""

    model_type: str = setting("llama_v3", "family of the model", choices=MODEL_TYPES)
    hidden_width: int = setting(256, "width of the residual stream", minimum=1)
    num_layers: int = setting(4, "number of transformer blocks", minimum=1)
    num_heads: int = setting(4, "number of attention (query) heads", minimum=1)
    num_key_value_heads: int | None = setting(None, "number of key/value heads; default: num_heads", minimum=1)
    head_width: int | None = setting(None, "width of one head; default: hidden_width / num_heads", minimum=1)
    intermediate_size: int | None = setting(
        None,
        "width inside the feed-forward part; default: 4 x hidden_width (gpt2), else 8/3 x, to a multiple of 256",
        minimum=1,
    )
    max_context_width: int = setting(256, "sequence length really trained on", minimum=2, unit="tokens")
    max_position_embeddings: int | None = setting(
        None, "longest context the model is made for; default: max_context_width", minimum=2, unit="tokens"
    )
    vocab_size: int | None = setting(None, "rows of the embedding; default: the tokenizer's", minimum=2)
    rotary_emb_base: float | None = setting(
        None, "base of the rotary position embedding (rope theta); default: the family's", minimum=1.0
    )
    rope_scaling: str = setting(
        "none", "how rotary frequencies are stretched for long contexts", choices=("none", "llama3")
    )
    rope_scaling_factor: float = setting(8.0, "llama3 scaling: factor the context was stretched by", minimum=1.0)
    rope_low_freq_factor: float = setting(1.0, "llama3 scaling: low-frequency bound", minimum=0.0)
    rope_high_freq_factor: float = setting(4.0, "llama3 scaling: high-frequency bound", minimum=0.0)
    rope_original_context: int = setting(8192, "llama3 scaling: context before stretching", minimum=1, unit="tokens")
    tie_word_embeddings: bool | None = setting(
        None, "share the embedding with the output head; default: the family's (gpt2: yes)"
    )
    sliding_window: int | None = setting(
        None, "attend only this far back; default: no window", minimum=1, unit="tokens"
    )
    attention_chunk_size: int = setting(
        8192, "llama4: rope layers attend inside chunks of this size", minimum=1, unit="tokens"
    )
    num_experts: int | None = setting(None, "experts per layer (mixtral, llama4); default: the family's", minimum=1)
    experts_per_token: int | None = setting(
        None, "experts each token goes to (mixtral, llama4); default: the family's", minimum=1
    )
    router_loss_weight: float = setting(0.001, "weight of the expert-balance loss (mixtral, llama4)", minimum=0.0)
    norm_epsilon: float = setting(1e-5, "epsilon of the norms", minimum=0.0)
    initializer_range: float = setting(0.02, "standard deviation of new weights", minimum=0.0)
    resid_pdrop: float = setting(0.0, "dropout on each block's output (gpt2)", minimum=0.0, maximum=1.0)
    embd_pdrop: float = setting(0.0, "dropout on the embeddings (gpt2)", minimum=0.0, maximum=1.0)
    attn_pdrop: float = setting(0.0, "dropout on attention weights", minimum=0.0, maximum=1.0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it becomes sequences, how many go into a step."""

    dataset: str = setting(
        "embedded",
        "'embedded' (a small text corpus that needs no network); token bins; text, JSONL, Parquet or Arrow files (a "
        "path or s3:// URI); a hub name; or several with weights, such as a:0.7,b:0.3",
    )
    dataset_config_name: str | None = setting(None, "which configuration of a hub data set; default: its own default")
    data_kind: str = setting(
        "auto",
        "rows are plain text, conversations, or preferences (a prompt with a chosen and a rejected answer); auto: what "
        "the keys of the first row say, preference with --objective=dpo",
        choices=("auto", "text", "chat", "preference"),
    )
    text_field: str = setting("text", "key or column that holds the text")
    messages_field: str = setting("messages", "key or column that holds a conversation's messages")
    tokenizer: str | None = setting(
        None, "folder, tokenizer.json or hub name; default: the data set's own, else the embedded one"
    )
    chat_template: str | None = setting(None, "file with a Jinja chat template; default: the tokenizer's own")
    malformed_rows: str = setting(
        "refuse", "rows that cannot be read: stop with their line, or skip and count them", choices=("refuse", "skip")
    )
    packing: str | None = setting(
        None,
        "concat: documents one after another, cut where a sequence is full; best_fit: whole documents, packed so that "
        "little is padded; none: one document a sequence, padded; default: best_fit for conversations and pairs of "
        "answers, else concat",
        choices=("concat", "best_fit", "none"),
    )
    long_documents: str | None = setting(
        None,
        "documents longer than a sequence: split over several, truncate (counted), or drop (counted); default: "
        "truncate for conversations, drop for pairs of answers, else split",
        choices=("split", "truncate", "drop"),
    )
    document_mask: bool = setting(
        True, "packed documents do not see each other (positions restart, attention stays inside)"
    )
    streaming: bool | None = setting(
        None, "tokenise while training instead of once before; default: for text on hubs and s3://, not for local files"
    )
    shuffle_window: int = setting(
        256, "streaming: documents shuffled at a time in each of the stream's lanes", minimum=1, unit="documents"
    )
    num_workers: int | None = setting(
        None, "processes per GPU that tokenise a stream; default: what the CPU cores give, at most 4", minimum=0
    )
    prefetch_steps: int = setting(2, "steps whose batches are made ahead, beside the training; 0: none", minimum=0)
    restart_data: bool = setting(
        False, "on resume with other data, seed or context: go on from the data's beginning instead of refusing"
    )
    train_batch_size: int = setting(1, "sequences per GPU and micro-step", minimum=1)
    val_batch_size: int | None = setting(None, "sequences per GPU in validation; default: train_batch_size", minimum=1)
    gradient_accumulation_steps: int | None = setting(
        None, "micro-steps per optimizer step; default: 1, or what global_batch_tokens needs", minimum=1
    )
    global_batch_tokens: int | None = setting(
        None, "tokens per optimizer step over all GPUs; sets gradient_accumulation_steps", minimum=1, unit="tokens"
    )
    epochs: int | None = setting(None, "passes over the data; default: as many as max_steps needs", minimum=1)
    seed: int = setting(42, "seed of weights, sample order and dropout", minimum=0)
    cache_dir: str = setting("~/.cache/hypershard", "where text is kept as token bins after the first tokenisation")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = setting(1e-4, "peak learning rate", minimum=0.0)
    min_lr: float = setting(1e-5, "learning rate at the end of the decay", minimum=0.0)
    lr_decay_style: str = setting(
        "cosine", "shape of the decay", choices=("cosine", "constant", "linear", "exponential", "plateau", "wsd")
    )
    lr_decay_iters: int | None = setting(
        None, "step at which min_lr is reached; default: the last step", minimum=1, unit="steps"
    )
    warmup: float = setting(0.0032, "share of lr_decay_iters spent on linear warm-up", minimum=0.0, maximum=1.0)
    plateau: float = setting(0.0, "share of lr_decay_iters held at the peak (plateau, wsd)", minimum=0.0, maximum=1.0)
    weight_decay: float = setting(0.2, "decoupled weight decay; never on norms and biases", minimum=0.0)
    beta1: float = setting(0.9, "decay of AdamW's first moment", minimum=0.0, maximum=1.0)
    beta2: float = setting(0.95, "decay of AdamW's second moment", minimum=0.0, maximum=1.0)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", minimum=0.0)
    grad_clip: float = setting(1.0, "largest global gradient norm; 0 does not clip", minimum=0.0)
    max_skipped_steps: int = setting(
        3, "steps in a row with a non-finite loss or gradient (each is skipped) before giving up", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over GPUs and what is traded for memory."""

    sharding_strategy: str = setting(
        "full",
        "full: weights, gradients and optimizer sharded over all GPUs; hybrid: sharded inside groups, copied between "
        "them; zero2: weights gathered once a step; zero1: gradients whole too; none: everything on every GPU",
        choices=("full", "hybrid", "zero1", "zero2", "none"),
    )
    hybrid_shard_degree: int | None = setting(
        None, "hybrid: GPUs per sharding group; default: the GPUs of one node", minimum=1
    )
    bf16: bool = setting(True, "compute in bfloat16; weights, gradients' sums and optimizer stay float32")
    activation_checkpointing: str = setting(
        "none",
        "recompute activations in backward: whole blocks (full, 1) or all but the expensive operations (selective)",
        choices=("none", "full", "selective"),
        aliases={"0": "none", "1": "full", "false": "none", "true": "full"},
    )
    offload_activations: bool = setting(False, "keep what backward needs in host memory")
    cpu_offload: bool = setting(False, "keep weights, gradients and optimizer in host memory")
    deterministic: bool = setting(
        False, "only operations that give the same bits every time; on a GPU attention's backward is slower with it"
    )
    compile: bool = setting(False, "torch.compile each block")
    attention: str = setting(
        "auto",
        "how packed documents stay blind to each other: dense (a mask over the whole row, any device), varlen "
        "(attention document by document: a flash kernel on GPUs, in bf16), or auto (varlen on GPUs with document_mask "
        "where the kernel serves, else dense)",
        choices=("auto", "dense", "varlen"),
    )
    limit_all_gathers: bool = setting(True, "bound the weights gathered ahead; FSDP2 always does, so 0 is refused")
    activation_loading_horizon: int | None = setting(
        None, "refused: saved activations are fetched when backward asks for them; there is no horizon to set"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how often, and from where."""

    max_steps: int | None = setting(
        None, "stop after this many optimizer steps; default: epochs (1) passes over the data", minimum=1
    )
    max_hours: float | None = setting(
        None, "stop, saved, after this many hours of training, resumed ones included", minimum=0.0, unit="hours"
    )
    logging_freq: int = setting(1, "steps between written lines", minimum=1, unit="steps")
    validation_freq: int | None = setting(
        None, "steps between validations; default: only at the end", minimum=1, unit="steps"
    )
    validation_batches: int = setting(10, "batches per GPU in one validation", minimum=1)
    validation_texts: int = setting(
        0, "texts that the model writes at each validation, for the report (greedy, all GPUs together)", minimum=0
    )
    validation_prompts: str | None = setting(
        None,
        "file with what the model goes on from, a line each; default: beginnings of held-out documents, and held-out "
        "conversations up to the answer",
    )
    validation_text_tokens: int = setting(64, "how long these texts become at most", minimum=1, unit="tokens")
    early_stopping_patience: int | None = setting(
        None, "stop after so many validations in a row without a lower loss; default: never", minimum=1
    )
    early_stopping_min_gain: float = setting(
        0.0,
        "share by which a validation loss must be lower than the lowest before it to count as lower",
        minimum=0.0,
        maximum=1.0,
    )
    init_from: str = setting(
        "scratch",
        "'scratch', 'resume' (a checkpoint must exist), or a Hugging Face model: a folder, s3:// URI or hub name",
    )
    eval_only: bool = setting(False, "validate once and stop")
    force: bool = setting(False, "start although the plan says that it does not fit into memory")
    peak_tflops_per_gpu: float | None = setting(
        None, "dense bf16 peak used for MFU; default: this GPU's from the catalog", minimum=0.0, unit="TFLOP/s"
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives, where, and how often it is written."""

    checkpoint_dir: str | None = setting(None, "where checkpoints are written; default: <run_dir>/checkpoints")
    checkpoint_freq: int | str | None = setting(
        500,
        "steps between saves to checkpoint_dir; 'none' saves only at the end and on a signal, 0 never, 'auto' from "
        "measured times and mtbf_hours",
        minimum=0,
        unit="steps",
        words=("auto",),
    )
    checkpoint_minutes: float | None = setting(
        None, "also save (to checkpoint_dir and S3) when the last save is so long ago", minimum=0.01, unit="minutes"
    )
    keep_best: bool = setting(
        False,
        "save at each validation whose loss is the lowest so far, and keep the newest of these whatever else goes",
    )
    keep_checkpoints: int = setting(3, "newest checkpoints kept in checkpoint_dir; older ones are deleted", minimum=1)
    async_checkpointing: bool = setting(True, "write checkpoints beside the training, from a copy in host memory")
    resume_from_checkpoint: str | None = setting(
        None,
        "go on from the newest valid checkpoint of all tiers, or start if there is none; with a value: of this folder, "
        "run directory, step directory or s3:// URI",
        value_when_bare="auto",
    )
    in_memory_checkpointing_freq: int | str | None = setting(
        10,
        "steps between saves to shared memory, which survive a crash of the processes; 0 or 'none' never, 'auto' as "
        "checkpoint_freq",
        minimum=0,
        unit="steps",
        words=("auto",),
    )
    memory_tier_dir: str = setting("/dev/shm", "where shared memory is mounted")
    num_memory_copies: int = setting(
        1, "other nodes that keep a copy of each memory checkpoint, so that it survives the loss of a node", minimum=0
    )
    hyperpod_memory_url: str | None = setting(
        None,
        "also put memory checkpoints into HyperPod's managed memory tier (EKS); without a value: at its usual address. "
        "The daemon asks for no password: only for networks you trust",
        value_when_bare="default",
    )
    local_tier_dir: str | None = setting(
        None, "disk of each node's own (NVMe) that keeps checkpoints too; default: no such tier"
    )
    local_checkpointing_freq: int | None = setting(
        50, "steps between saves to local_tier_dir; 0 or 'none' never", minimum=0, unit="steps"
    )
    keep_local_checkpoints: int = setting(2, "newest checkpoints kept in local_tier_dir", minimum=2)
    s3_tier_base_path: str | None = setting(
        None, "s3://bucket/prefix of this run's checkpoints in S3; default: no such tier"
    )
    s3_checkpointing_freq: int | str | None = setting(
        20,
        "steps between uploads to s3_tier_base_path; 'none' only at the end and on a signal, 0 never, 'auto' as "
        "checkpoint_freq",
        minimum=0,
        unit="steps",
        words=("auto",),
    )
    keep_s3_checkpoints: int = setting(3, "newest checkpoints kept in S3", minimum=1)
    keep_s3_every: int | None = setting(
        None, "checkpoints in S3 whose step is a multiple of this are kept for good", minimum=1, unit="steps"
    )
    s3_save_minutes: float = setting(
        60.0, "an upload that takes longer is given up, with an alarm; training goes on", minimum=0.1, unit="minutes"
    )
    mtbf_hours: float | None = setting(
        None,
        "mean time between failures of the whole job, for 'auto'; default: 50,700 GPU hours (Llama 3's) / GPUs",
        minimum=0.01,
        unit="hours",
    )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA (arXiv 2106.09685): small matrices beside the model's weights are trained, the weights stay as they are."""

    lora_r: int = setting(0, "rank of the adapters: only they are trained; 0: no adapters, all weights are", minimum=0)
    lora_alpha: float = setting(16.0, "adapters count lora_alpha / lora_r times", minimum=0.0)
    lora_dropout: float = setting(0.0, "dropout on the adapters' inputs", minimum=0.0, maximum=1.0)
    lora_targets: str = setting(
        "all-linear",
        "weights that get adapters: all-linear (every matrix of the blocks, of experts too; not routers, embedding and "
        "output head), or names with commas between, such as q_proj,v_proj or mlp.experts.down_proj",
    )
    lora_rslora: bool = setting(False, "rank-stabilised: adapters count lora_alpha / sqrt(lora_r) times")
    lora_init_from: str | None = setting(
        None, "folder of an adapter in PEFT's format to start from; default: adapters that change nothing yet"
    )
    bnb_quant_type: str = setting(
        "none",
        "how the frozen matrices of the blocks are held: as the model's other weights, or in nf4, 4 bits and a scale "
        "(QLoRA, arXiv 2305.14314), quantised while they are read",
        choices=("none", "nf4"),
    )
    bnb_double_quant: bool = setting(True, "nf4's scales are quantised too: 4.14 bits a weight instead of 4.5")


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """What is learnt."""

    objective: str = setting(
        "next_token",
        "next_token: to write what the data hold; dpo: to prefer the chosen to the rejected answer (arXiv 2305.18290), "
        "against the model without its adapters",
        choices=("next_token", "dpo"),
    )
    dpo_beta: float = setting(0.1, "dpo: how dear it is to move away from the frozen model", minimum=0.0)
    dpo_label_smoothing: float = setting(
        0.0, "dpo: share of the pairs taken to be labelled the wrong way round", minimum=0.0, maximum=0.5
    )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Where numbers go besides <run_dir>/metrics.jsonl."""

    run_dir: str | None = setting(None, "folder of this run; default: runs/<date>-<run_name>")
    run_name: str | None = setting(None, "name of the run; default: the model's")
    tensorboard_dir: str | None = setting(
        None, "TensorBoard folder; default: <run_dir>/tensorboard; 'none' writes none", words=("none",)
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole resolved configuration; only `train/setup.py` and `cli/` see it whole."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    adapters: AdapterConfig = AdapterConfig()
    learning: LearningConfig = LearningConfig()
    report: ReportConfig = ReportConfig()

    @property
    def data_read(self) -> DataConfig:
        """The data section as data are opened by it: rows of conversations may hold pairs of answers besides, and what
        is learnt says which are meant."""
        if self.learning.objective == "dpo" and self.data.data_kind == "auto":
            return dataclasses.replace(self.data, data_kind="preference")
        return self.data


SECTIONS: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(Config)}
SETTINGS: dict[str, tuple[str, dataclasses.Field[Any]]] = {
    field.name: (section, field) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)
}
assert len(SETTINGS) == sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values()), (
    "a setting's name must be unique"
)
