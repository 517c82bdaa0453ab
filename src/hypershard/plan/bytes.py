"""Memory in closed form: bytes of one GPU at each moment of a training, and of one node's host.

GPU bytes are listed moment by moment, each term with the pool of the allocator it lies in. FSDP2 gathers weights and
reduces gradients on streams of their own, and memory freed on one stream serves no other, so what the allocator
reserves is the sum of each pool's own peak, which is more than the most that is ever in use at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..adapters.targets import adapter_targets
from ..config.schema import ModelConfig
from .job import Job, Sizes, sizes_of

GIB = 2**30
# Reserved by the allocator over what a pool holds at its peak, of what comes and goes; what lasts is allocated once and
# wastes nothing. Chosen so on three readings (tests/plan/test_bytes.py), which alone ask for 1.12, 1.10 and 1.10:
# torchtitan Llama-3.1-8B on 8 and 128 GPUs, and the replayed trace of Llama-3.2-1B.
FRAGMENTATION = 1.11
OUTSIDE_BYTES = int(1.5 * GIB)  # CUDA context, libraries and NCCL's buffers, 1 to 2 GiB; an assumption
_OUTSIDE_CPU_BYTES = int(0.45 * GIB)  # Python with torch and transformers loaded, beside the tensors of a rank on a CPU
USABLE_SHARE = 0.985  # of what EC2 reports, that a process gets: A10G 22.0 of 22.4, A100 39.4 of 40, H100 79.6 of 80
TIGHT_FROM = 0.92  # of the usable memory
BAND = 0.12  # of this closed form, either way

_POOLS = ("compute", "gather", "reduce")
CHUNK_NUMEL = 2**27  # logits held at a time: train/loss.py's, and a test holds the two together
_MASTER_BYTES, _MOMENT_BYTES, _REDUCE_BYTES = 4, 8, 4  # a weight, AdamW's two moments, a gradient, in float32
_UNPACKING_BYTES = 12 * 2**23  # of temporaries, over the weights that adapters/nf4.py takes at a time
_STATE_BYTES = _MASTER_BYTES + _MOMENT_BYTES  # of a parameter in a checkpoint

_PROCESS_BYTES = 4 * GIB  # Python, torch and CUDA's host side, per rank; an assumption
_WORKER_BYTES = int(0.7 * GIB)  # a process that tokenises a stream; an assumption
_MOST_WORKERS = 4  # train/data.py's
_COPY_SLOTS = 2  # checkpoint/memory.py's _NUM_COPY_SLOTS
_SHARED_MEMORY_SHARE = 0.5  # of RAM: what Linux gives /dev/shm unless told otherwise
_HOST_SHARE = 0.95  # of RAM, that the system and its page tables leave


@dataclass(frozen=True)
class Term:
    """One part of memory; `pool` is the allocator's: compute, gather or reduce (on a host: ram or shm).

    `lasts`: of the same size from step to step, so that the allocator wastes nothing on it.
    """

    name: str
    num_bytes: float
    pool: str = "compute"
    lasts: bool = False


@dataclass(frozen=True)
class Moment:
    """What lies in a GPU's memory at one moment of a training.

    `hole_bytes` lie free in the compute pool, in pieces that are too small for this moment's largest buffer.
    """

    name: str
    terms: tuple[Term, ...]
    hole_bytes: float = 0.0

    @property
    def num_bytes(self) -> float:
        """In use, without what the allocator wastes."""
        return sum(term.num_bytes for term in self.terms)

    def reserved_in(self, pool: str) -> float:
        """What the allocator reserves in one pool for this moment."""
        terms = [term for term in self.terms if term.pool == pool]
        if self.hole_bytes and pool == "compute":
            return self.hole_bytes + sum(term.num_bytes for term in terms)
        return sum(term.num_bytes * (1.0 if term.lasts else FRAGMENTATION) for term in terms)


@dataclass(frozen=True)
class Fit:
    """Bytes needed against bytes `of` a memory.

    `verdict`: fits, with 8 % to spare; does not fit, when not even `least_bytes` have room; between the two it is
    tight: on a GPU the allocator then gives memory of one stream back and asks for it on another, which is slow.
    """

    of: str
    needed_bytes: float
    least_bytes: float
    usable_bytes: float

    @property
    def verdict(self) -> str:
        if self.needed_bytes <= TIGHT_FROM * self.usable_bytes:
            return "fits"
        return "tight" if self.least_bytes <= self.usable_bytes else "does not fit"


def worst_verdict(*fits: Fit) -> str:
    """The verdict of memories that must all suffice."""
    order = ("fits", "tight", "does not fit")
    return max((fit.verdict for fit in fits), key=order.index)


@dataclass(frozen=True)
class Saved:
    """Bytes that one token leaves in one block for backward: `whole` without checkpointing; `kept` with this job's
    kind of it; `on_host` the part of `kept` that --offload_activations moves away."""

    whole: float
    kept: float
    on_host: float


# --- activations


def saved_by_token(job: Job) -> Saved:
    """What forward leaves for backward, per token and block, in bytes.

    Counted from the operations of transformers' modules; for Llama equal to what torch's tracker found (Llama-3.2-1B:
    108,680 bytes). Selective checkpointing's own results wait in a table of its own and are not offloaded.
    """
    model, size = job.model, job.number_bytes
    whole = _whole(job, size) + _dense_attention(job) + _by_adapters(job)
    block_input = float(size * model.hidden_width)
    kind = job.parallel.activation_checkpointing
    if kind == "none":
        kept = movable = whole
    elif kind == "full":
        kept = movable = block_input
    else:
        kept, movable = min(whole, block_input + _kept_by_selective(model, size)), block_input
    return Saved(whole=whole, kept=kept, on_host=movable if job.parallel.offload_activations else 0.0)


def _by_adapters(job: Job) -> float:
    """What adapters add per token and block: x A^T, and with dropout what it leaves of x and which of it, in bytes.

    An upper bound: what products without adapters would have saved is not taken off.
    """
    adapters, size = job.adapters, job.number_bytes
    total = 0.0
    for target in adapter_targets(job.model, adapters):
        uses = target.matrix.spec.active_share * (target.matrix.num_experts or 1)  # of a token, one per expert
        dropped = (size + 1) * target.matrix.width_in if adapters.lora_dropout else 0
        total += uses * (size * adapters.lora_r + dropped)
    return total / job.model.num_layers


def _dense_attention(job: Job) -> float:
    """What attention with a mask keeps besides, per token and block: keys and values once per query head, since its
    kernel shares none, and the mask as numbers to add, which each block makes anew."""
    if job.attention_path != "dense" or not job.data.document_mask or not job.has_gpus:
        return 0.0
    _, queries, keys, _ = _widths(job.model)
    return job.number_bytes * (2.0 * (queries - keys) + job.model.max_context_width)


def _widths(model: ModelConfig) -> tuple[int, int, int, int]:
    """Widths of the residual stream, of all query heads, of all key heads, and inside the feed-forward part."""
    head = model.head_width or model.hidden_width // model.num_heads
    keys = model.num_key_value_heads or model.num_heads
    assert model.intermediate_size is not None
    return model.hidden_width, model.num_heads * head, keys * head, model.intermediate_size


def _whole(job: Job, size: int) -> float:
    model, is_compiled = job.model, job.parallel.compile
    hidden, queries, keys, inner = _widths(model)
    log_sums = 4 * model.num_heads
    if model.model_type == "gpt2":
        # Norms: input and output. Products: q, k, v and attention's result. GELU by parts: x, x/2, tanh, 1 + tanh.
        parts = (2 if is_compiled else 5) * inner
        return size * (parts + 8 * hidden) + log_sums + 16
    # RMSNorm in parts keeps its input in float32, the result, and for its weight's gradient the normed values; a
    # compiler keeps the input alone.
    for_weight = 0 if job.has_adapters else size
    norms = 4 * size * hidden if is_compiled else 2 * (4 + size + for_weight) * hidden
    attention = 2 * size * (queries + keys) + log_sums + 8
    gated = (3 if is_compiled else 4) * size * inner  # gate, up, silu(gate), and their product
    if model.model_type not in ("mixtral", "llama4"):
        return norms + attention + gated
    assert model.num_experts and model.experts_per_token
    # A token's row for each of its experts, with and without its weight; the router's scores.
    routed = model.experts_per_token * (gated + 2 * size * hidden + 32) + 4 * model.num_experts
    if model.model_type == "mixtral":
        return norms + attention + routed
    return (
        norms + attention + routed + gated + 4 * (queries + keys)
    )  # a shared expert; queries' and keys' norms in float32


def _kept_by_selective(model: ModelConfig, size: int) -> float:
    """Attention's result, and every second matrix product in the order of parallel/activation.py.

    Products with a bias (aten.addmm) are not on its list: GPT-2 has no other, Qwen2 none but these for q, k and v.
    """
    hidden, queries, keys, inner = _widths(model)
    attention = size * queries + 4 * model.num_heads
    experts, chosen = model.num_experts or 0, model.experts_per_token or 0
    products = {
        "gpt2": 0,
        "qwen2": hidden + inner,  # o, up
        "mixtral": queries + keys + experts + chosen * hidden,  # q, v, router, down
        "llama4": queries + keys + experts + inner + chosen * 2 * inner,  # q, v, router, shared up, gate and up
    }.get(model.model_type, queries + keys + inner + hidden)  # q, v, gate, down
    return attention + size * products


# --- a GPU, moment by moment


def gpu_moments(job: Job) -> tuple[Moment, ...]:
    """Bytes of the fullest GPU when training starts, in a step, at a save and on resume."""
    sizes = sizes_of(job.model)
    static = _static(job)
    tokens = job.micro_tokens
    saved = saved_by_token(job)
    layers = job.model.num_layers
    kept = (saved.kept - saved.on_host) * tokens  # by one block
    activations = Term("activations", kept * layers)
    norm = Term("final norm and its gradient", (4 + 3 * job.number_bytes) * job.model.hidden_width * tokens)
    mask = _mask(job)
    gathered, carried, unpacked = _gathered(job), _carried_gradients(job), _unpacked(job)
    fetched = _gather_buffers(job, job.gathered.block / job.shard_degree + job.gathered.block)
    head = Term("the head's gradient", job.number_bytes * _head_gradient(job))
    return (
        Moment("start", static),
        Moment("first block", (*static, *_first_gathered(job), *unpacked, *mask, *carried)),
        Moment("end of forward", (*static, *gathered, *fetched, activations, norm, *mask, logits(job), *carried)),
        Moment(
            "backward",
            (
                *static,
                *gathered,
                *fetched,
                activations,
                *unpacked,
                *mask,
                *_one_block(job, saved, given_back=kept),
                head,
                *carried,
            ),
        ),
        Moment(
            "last backward",
            (
                *static,
                _running(job),
                *unpacked,
                *mask,
                *_one_block(job, saved, given_back=0.0),
                head,
                *_gradients(job),
            ),
        ),
        Moment(
            "end of backward",
            (*static, *_root_reduced(job, sizes), *_gradients(job)),
            _hole(job, sizes, freed=activations.num_bytes + norm.num_bytes + logits(job).num_bytes),
        ),
        # Saves copy shards straight into host memory, and restores fill the tensors that are there.
        Moment("first save", static),
        Moment("resume", static),
    )


def logits(job: Job) -> Term:
    """The loss's chunk of logits with its temporaries, and the head's gradient summed in float32 (train/loss.py)."""
    vocab, size = job.model.vocab_size or 0, job.number_bytes
    chunk = min(max(1, CHUNK_NUMEL // vocab), job.micro_tokens) * vocab
    weight = _head_gradient(job)
    # Float32 logits and logsumexp's copy of them; later their gradient and the chunk's share of the weight's.
    return Term("logits", 4 * weight + max(8 * chunk, size * (chunk + weight)))


def _head_gradient(job: Job) -> int:
    """Numbers in the output head's gradient; a frozen one has none."""
    return 0 if job.has_adapters else (job.model.vocab_size or 0) * job.model.hidden_width


def _static(job: Job) -> tuple[Term, ...]:
    if job.parallel.cpu_offload:
        return ()
    trained = job.trained.shard(job.shard_degree)
    optimizer = Term("optimizer", _MOMENT_BYTES * trained, lasts=True)
    if not job.has_adapters:
        return Term("weights", _MASTER_BYTES * trained, lasts=True), optimizer
    frozen = job.gathered.shard(job.shard_degree)  # held as they are gathered (train/setup.py)
    return Term("weights", frozen, lasts=True), Term("adapters", _MASTER_BYTES * trained, lasts=True), optimizer


def _keeps_gathered(job: Job) -> bool:
    return job.parallel.sharding_strategy in ("zero1", "zero2", "none")


def _gathered(job: Job) -> list[Term]:
    """Whole weights in the compute type, or packed: the root's, and all blocks' or those of the block that runs."""
    if _keeps_gathered(job):
        return [Term("gathered weights", job.gathered.total)]
    return [_running(job)]


def _first_gathered(job: Job) -> list[Term]:
    """When the first block runs: the root's buffer is still alive when the block's is asked for. So are later those of
    two blocks, which are more where blocks are larger than the root."""
    block = job.gathered.block * (1 + 1 / job.shard_degree)
    return [_running(job), *_gather_buffers(job, max(job.gathered.root, block) + block)]


def _running(job: Job) -> Term:
    """The weights of one block and of the root: the first block's in forward, and again when backward comes to it."""
    return Term("gathered weights", job.gathered.root + job.gathered.block)


def _unpacked(job: Job) -> list[Term]:
    """A weight in NF4 has its numbers while it is multiplied by, one at a time: of experts so many as nf4_ops.py takes.

    They are worked out in parts, whose temporaries are about 100 MB (nf4.py); compiled, without any.
    """
    if not job.num_unpacked:
        return []
    beside = 0 if job.parallel.compile else min(_UNPACKING_BYTES, 12 * job.num_unpacked)
    return [Term("one dequantised weight", job.number_bytes * job.num_unpacked + beside)]


def _gather_buffers(job: Job, num_bytes: float) -> list[Term]:
    """What all-gathers write to before it is copied out; nothing is gathered where every GPU has all."""
    if job.shard_degree == 1:
        return []
    return [Term("all-gather buffers", num_bytes, "gather")]


def _gradients(job: Job) -> list[Term]:
    shard = 0 if job.parallel.cpu_offload else job.trained.shard(job.shard_degree)
    return [Term("gradients", _REDUCE_BYTES * shard, "reduce", lasts=True)]


def _carried_gradients(job: Job) -> list[Term]:
    """What earlier micro-steps leave: whole gradients where they are reduced once a step, else shards of them."""
    if job.accumulation == 1:
        return []
    if job.parallel.sharding_strategy in ("zero1", "none"):
        return [Term("gradients", _REDUCE_BYTES * job.trained.total, lasts=True)]
    # The buffer of the last reduction, the root's, lives until a block's takes its place.
    return [*_gradients(job), Term("the root's gradients", _REDUCE_BYTES * job.trained.root)]


def _one_block(job: Job, saved: Saved, *, given_back: float) -> list[Term]:
    """The block whose backward runs: what is computed or fetched again, and gradients on their way out.

    The worst is either the last block, or one before it while the gradients of the one behind are reduced, or the end
    of that one's own backward. `given_back`: bytes that one block had kept, which are free where it is not the last.
    """
    hidden, _, _, inner = _widths(job.model)
    again = (saved.whole - saved.kept + saved.on_host) * job.micro_tokens
    passing = job.number_bytes * (2 * inner + 4 * hidden) * job.micro_tokens
    own, reduced = job.number_bytes * job.trained.block, _REDUCE_BYTES * job.trained.block
    # Experts' gradients come while most of what is kept is still there; those of dense blocks while it goes.
    early = own if job.model.num_experts else 0
    gradients = max(0.0, reduced + early - given_back, reduced + own - given_back - again - passing)
    return [
        Term("one block again", again),
        Term("one block's backward", passing),
        Term("one block's gradients", gradients),
    ]


def _root_reduced(job: Job, sizes: Sizes) -> list[Term]:
    """The root comes last: the gradients of its weights, and the buffer that these are reduced from.

    A head that is the embedding has two gradients and their sum, before the weights are given back.
    """
    if job.has_adapters:
        return [Term("gathered weights", job.number_bytes * sizes.root)]
    if job.model.tie_word_embeddings:
        return [
            Term("gathered weights", job.number_bytes * sizes.root),
            Term("the root's gradients", max(3 * job.number_bytes, _REDUCE_BYTES) * sizes.root),
        ]
    gradients = [Term("the root's gradients", (job.number_bytes + _REDUCE_BYTES) * sizes.root)]
    # FSDP2 divides what it would have scattered, into a copy; and what goes to the host is first reduced here.
    if job.shard_degree == 1 or job.parallel.cpu_offload:
        gradients.append(Term("the root's gradients", _REDUCE_BYTES * sizes.root / job.shard_degree, "reduce"))
    return gradients


def _hole(job: Job, sizes: Sizes, *, freed: float) -> float:
    """What the root's reduction cannot use: its buffer is one piece, and where it is larger than what forward and the
    loss had taken (`freed`), below the head's gradient, it goes behind that. The embedding's gradient still finds room.
    """
    if job.has_adapters or _keeps_gathered(job) or job.model.tie_word_embeddings or _REDUCE_BYTES * sizes.root <= freed:
        return 0.0
    return freed + _running(job).num_bytes - job.number_bytes * sizes.root / 2


def _mask(job: Job) -> list[Term]:
    """Dense attention's mask of packed documents, as booleans; blocks make numbers of it."""
    if job.attention_path != "dense" or not job.data.document_mask:
        return []
    return [Term("attention mask", job.micro_tokens * job.model.max_context_width)]


def peak(moments: tuple[Moment, ...]) -> Moment:
    """The moment with most bytes in use."""
    return max(moments, key=lambda moment: moment.num_bytes)


def reserved_bytes(moments: tuple[Moment, ...]) -> float:
    """What torch's allocator reserves: each pool's own peak, with what is wasted between its blocks."""
    return sum(max(moment.reserved_in(pool) for moment in moments) for pool in _POOLS)


def gpu_fit(job: Job, moments: tuple[Moment, ...]) -> Fit:
    """Whether the fullest GPU holds all of it; holes are given back when memory runs out."""
    whole = [dataclasses.replace(moment, hole_bytes=0.0) for moment in moments]
    least = max(sum(moment.reserved_in(pool) for pool in _POOLS) for moment in whole)
    outside = OUTSIDE_BYTES if job.has_gpus else _OUTSIDE_CPU_BYTES
    return Fit(
        of="a GPU's memory" if job.has_gpus else "a rank's share of the host's memory",
        needed_bytes=reserved_bytes(moments) + outside,
        least_bytes=least + outside,
        usable_bytes=job.instance.gpu_memory_mib * 2**20 * USABLE_SHARE,
    )


# --- a node's host


def state_bytes(job: Job) -> int:
    """Bytes of one whole checkpoint: trained weights and their moments, once."""
    return _STATE_BYTES * job.trained.total


def num_slots(job: Job) -> int:
    """Copies of its tensors that each rank keeps in host memory, as `checkpoint/memory.py` claims them."""
    checkpoint = job.checkpoint
    durable = int(checkpoint.checkpoint_freq != 0)
    durable += int(checkpoint.s3_tier_base_path is not None and checkpoint.s3_checkpointing_freq != 0)
    in_memory = bool(checkpoint.in_memory_checkpointing_freq)
    local = bool(checkpoint.local_tier_dir and checkpoint.local_checkpointing_freq)
    readers = durable if checkpoint.async_checkpointing else 0
    if in_memory:
        return readers + 2
    return max(readers, 1) if checkpoint.async_checkpointing or local else 0


def host_terms(job: Job) -> tuple[Term, ...]:
    """Bytes of one node's host memory at their most."""
    ranks, trained = job.instance.num_gpus, job.trained.shard(job.shard_degree)
    slot = _STATE_BYTES * trained
    in_memory = bool(job.checkpoint.in_memory_checkpointing_freq)
    copies = min(job.checkpoint.num_memory_copies, job.num_nodes - 1) if in_memory else 0
    frozen = job.gathered.shard(job.shard_degree) if job.has_adapters else 0
    offloaded = frozen + (_STATE_BYTES + _REDUCE_BYTES) * trained if job.parallel.cpu_offload else 0
    activations = saved_by_token(job).on_host * job.micro_tokens * job.model.num_layers
    return (
        Term("processes", ranks * _PROCESS_BYTES * job.has_gpus, "ram"),  # on a CPU they are the ranks' own memory
        Term("data workers", ranks * _num_workers(job) * _WORKER_BYTES, "ram"),
        Term("weights, gradients, optimizer", ranks * offloaded, "ram"),
        Term("offloaded activations", ranks * activations, "ram"),
        Term("checkpoint slots", ranks * num_slots(job) * slot, "shm" if in_memory else "ram"),
        Term("copies of other nodes", ranks * copies * _COPY_SLOTS * slot, "shm"),
    )


def _num_workers(job: Job) -> int:
    """Processes per rank that tokenise; none where the data are token bins, which is taken as so unless said."""
    if job.data.num_workers is not None:
        return job.data.num_workers
    if not job.data.streaming:
        return 0
    return max(0, min(_MOST_WORKERS, job.instance.num_vcpus // job.instance.num_gpus - 1))


def host_fit(job: Job, terms: tuple[Term, ...]) -> Fit:
    """Whether a node's memory holds all of it; of two limits, RAM and its half for /dev/shm, the nearer one."""
    ram = job.instance.ram_gib * GIB
    whole = sum(term.num_bytes for term in terms)
    shared = sum(term.num_bytes for term in terms if term.pool == "shm")
    limits = (
        Fit("RAM", whole, whole, ram * _HOST_SHARE),
        Fit("/dev/shm, half of RAM unless told otherwise", shared, shared, ram * _SHARED_MEMORY_SHARE),
    )
    return max(limits, key=lambda fit: fit.needed_bytes / fit.usable_bytes)
