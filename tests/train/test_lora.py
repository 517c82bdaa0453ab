"""Adapters under FSDP2: what is trained, kept, gathered and saved, and that it is the same however it is spread."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf_folders import write_hf_folder
from tests.jobs import a_job, config_of, tiny, train_losses
from tests.rank_pool import RankPool
from tests.train.test_numerics import assert_same_training
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypershard.distributed.env import Surroundings
from hypershard.distributed.process_group import World
from hypershard.errors import HypershardError
from hypershard.metrics.on_track import Forecast
from hypershard.train.evaluate import evaluate
from hypershard.train.loss import summed_cross_entropy
from hypershard.train.restore import Start, restore
from hypershard.train.setup import build_job
from hypershard.train.state import Progress, advance
from hypershard.train.step import train_step

FAMILIES = ("tiny_llama", "tiny_mixtral", "tiny_mixtral --num_experts 3", "tiny_llama4", "tiny_qwen2", "tiny_gpt2")
LAYERS = 3


def lora(**overrides: Any) -> str:
    return tiny(**{"lora_r": 8, "lr": 0.01, **overrides})


def family(model: str) -> str:
    return f"--model {model} --num_layers 2 --max_context_width 64 --max_steps 9 --lr 0.01 --warmup 0 --bf16 0"


# --- what is computed


@pytest.mark.parametrize("model", FAMILIES)
def test_new_adapters_change_nothing_and_one_rank_trains_as_two(
    pools: Callable[[int], RankPool], cache_dir: Path, model: str
) -> None:
    """B is zero, so the first loss is that of the model alone, bit for bit, in float32 and in bfloat16.

    Three experts do not divide among two ranks, so each rank holds a part of each of them, and of their adapters.
    """
    flags = f"{family(model)} --train_batch_size 4"
    for precision in ("", " --bf16 1"):
        alone = pools(1).run(train_losses, flags + precision, cache_dir, 1)[0]
        beside = pools(1).run(train_losses, f"{flags}{precision} --lora_r 8", cache_dir, 1)[0]
        assert beside[0][0] == alone[0][0] and beside[0][1] > 0
    one = pools(1).run(train_losses, f"{flags} --lora_r 8", cache_dir, 3)[0]
    spread = f"{family(model)} --train_batch_size 1 --gradient_accumulation_steps 2 --lora_r 8"
    two = pools(2).run(train_losses, spread, cache_dir, 3)[0]
    assert_same_training(two, one)
    assert one[2][0] < one[0][0]


@pytest.mark.parametrize(
    ("settings", "is_exact"),
    [
        ({"activation_checkpointing": "full"}, True),
        ({"activation_checkpointing": "selective", "lora_dropout": 0.3}, True),
        ({"activation_checkpointing": "full", "offload_activations": 1, "cpu_offload": 1, "lora_dropout": 0.3}, True),
        ({"sharding_strategy": "zero1"}, True),
        ({"attention": "varlen"}, False),
        ({"compile": 1, "activation_checkpointing": "selective", "num_layers": 1}, False),
    ],
    ids=str,
)
def test_what_else_is_switched_on_changes_no_number(
    pools: Callable[[int], RankPool], cache_dir: Path, settings: dict, is_exact: bool
) -> None:
    if "compile" in settings and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    base = {
        "train_batch_size": 2,
        **{name: settings[name] for name in ("lora_dropout", "num_layers") if name in settings},
    }
    plain = pools(2).run(train_losses, lora(**base), cache_dir, 3)[0]
    found = pools(2).run(train_losses, lora(**{**base, **settings}), cache_dir, 3)[0]
    if is_exact:
        assert found == plain
    else:
        assert_same_training(found, plain)


def test_dropout_acts_in_training_only(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    plain, dropped = (pools(1).run(losses_and_validation, lora(lora_dropout=p), cache_dir)[0] for p in (0.0, 0.3))
    assert plain[1] != dropped[1] and plain[0] == dropped[0]


def losses_and_validation(world: World, flags: str, cache_dir: Path) -> tuple[float, float]:
    """Validation with adapters drawn anew that are not zero, and the loss of a step with them."""
    with a_job(world, flags, cache_dir) as job:
        for name, parameter in job.parameters.items():
            if name.endswith("lora_B"):
                parameter.detach().fill_(0.01)
        return evaluate(job)["validation_loss"], train_step(job, Progress(), flags=tuple).loss


def write_eight_texts(file: Path) -> str:
    """Write `file`, and return the flags to learn it by heart.

    The frozen head and embedding are random, but wide enough apart (initializer_range) to tell any token.
    """
    words = ["anchor", "basalt", "candle", "dahlia", "ember", "fjord", "garnet", "harbor"]
    texts = [
        f"{word} number {i} is kept in house {(7 * i + 3) % 11} by {words[(3 * i + 1) % 8]}."
        for i, word in enumerate(words)
    ]
    file.write_text("\n\n".join(texts) + "\n")
    return lora(
        dataset=file,
        lora_r=16,
        lora_alpha=32,
        initializer_range=0.3,
        train_batch_size=1,
        max_steps=120,
        epochs=200,
        lr=0.02,
        lr_decay_style="cosine",
        weight_decay=0,
    )


def test_adapters_learn_eight_texts_by_heart(pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path) -> None:
    found = pools(1).run(train_losses, write_eight_texts(tmp_path / "eight.txt"), cache_dir, 120)[0]
    assert found[0][0] > 5 and found[-1][0] < 0.02


# --- what is kept and sent


def frozen_facts(world: World, flags: str, cache_dir: Path) -> dict[str, Any]:
    """After five steps: bytes and numbers of frozen weights, whether they moved, what got a gradient or moments."""
    with a_job(world, flags, cache_dir) as job:
        frozen = {name: one for name, one in job.module.hf_model.named_parameters() if not one.requires_grad}
        before = {name: bits(one).clone() for name, one in frozen.items()}
        progress = Progress()
        for _ in range(5):
            progress = advance(progress, train_step(job, progress, flags=tuple), seconds=0.0)
        frozen = {name: one for name, one in job.module.hf_model.named_parameters() if not one.requires_grad}
        assert frozen.keys() == before.keys()
        storages = {one.to_local().untyped_storage().data_ptr(): one.to_local() for one in frozen.values()}
        return {
            "unchanged": all(torch.equal(bits(one), before[name]) for name, one in frozen.items()),
            "gradients": [name for name, one in frozen.items() if one.grad is not None],
            "moments": {name for name, one in job.parameters.items() if one in job.optimizer.state},
            "bytes": sum(local.untyped_storage().nbytes() for local in storages.values()),
            "numbers": sum(one.numel() for one in frozen.values()),
            "names": set(job.tensors()),
            "trained": {str(one.dtype) for one in job.parameters.values()},
        }


def bits(parameter: Any) -> torch.Tensor:
    """Of this rank's part; as numbers, packed weights may not equal themselves."""
    return parameter.to_local().view(torch.uint8)


def test_frozen_weights_take_two_bytes_and_stay(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    for found in pools(2).run(frozen_facts, lora(bf16=1, train_batch_size=1), cache_dir):
        assert found["unchanged"] and not found["gradients"]
        assert found["bytes"] * 2 == 2 * found["numbers"]  # two ranks, two bytes
        assert found["trained"] == {"torch.float32"}
        adapters = {name for name in found["names"] if "lora_" in name}
        assert found["names"] == adapters and len(adapters) == 3 * len(found["moments"])


def test_a_frozen_head_has_no_gradient() -> None:
    hidden, head = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    loss = summed_cross_entropy(hidden, head, torch.arange(6), chunk_rows=2)
    kept_for_hidden, kept_for_head = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert kept_for_hidden.shape == hidden.shape and kept_for_head is None


class Sent(TorchDispatchMode):
    """What reaches the process group: how often, and how many bytes of one rank's go in."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1].strip("_").removesuffix("_base")
            self.counts[name] = self.counts.get(name, 0) + 1
            tensor = args[1] if name in ("allgather", "reduce_scatter") else args[0]
            tensors = tensor if isinstance(tensor, list | tuple) else [tensor]
            self.bytes[name] = self.bytes.get(name, 0) + sum(one.nbytes for one in tensors)
        return func(*args, **(kwargs or {}))


def sent_in_a_step(world: World, flags: str, cache_dir: Path) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Calls and bytes of one step, and numbers of the model's parts: blocks' weights, the rest, adapters."""
    with a_job(world, flags, cache_dir) as job:
        progress = advance(Progress(), train_step(job, Progress(), flags=tuple), seconds=0.0)
        with Sent() as sent:
            train_step(job, progress, flags=tuple)
        sizes = {"blocks": 0, "root": 0, "adapters": 0}
        for name, one in job.module.hf_model.named_parameters():
            sizes["adapters" if one.requires_grad else "blocks" if ".layers." in name else "root"] += one.numel()
        return sent.counts, sent.bytes, sizes


def test_only_adapters_gradients_are_reduced(pools: Callable[[int], RankPool], cache_dir: Path) -> None:
    """Weights are gathered in bfloat16: blocks forward and again backward but for the last one, the rest once."""
    flags = lora(bf16=1, train_batch_size=1, gradient_accumulation_steps=2)
    counts, sent, sizes = pools(2).run(sent_in_a_step, flags, cache_dir)[0]
    assert counts["allgather"] == 2 * 2 * LAYERS and counts["reduce_scatter"] == 2 * LAYERS
    gathered = (sizes["blocks"] + sizes["adapters"]) * (2 * LAYERS - 1) // LAYERS + sizes["root"]
    assert sent["allgather"] == 2 * gathered * 2 // 2  # micro-steps x numbers x bytes / ranks
    assert sent["reduce_scatter"] == 2 * sizes["adapters"] * 4


# --- saved and gone on from


def whole_tensors(job: Any) -> dict[str, Any]:
    whole = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in job.tensors().items()}
    return {name: tensor.clone() for name, tensor in whole.items()}


def some_steps(
    world: World, flags: str, cache_dir: Path, folder: Path, *, resume: bool = False
) -> tuple[dict[str, Any], list[float]]:
    """The tensors a resumed run starts from, or a new one ends with, and its losses; saves at its end."""
    job = build_job(
        config_of(f"{flags} --checkpoint_freq none --in_memory_checkpointing_freq 0", cache_dir=cache_dir),
        world,
        checkpoint_dir=folder,
        surroundings=Surroundings(),
        alarm=print,
        foresee=lambda model, last_step: Forecast(),
    )
    progress = restore(job, Start(resume=resume, required=resume))
    tensors = whole_tensors(job)
    job.checkpoints.begin(progress.step, job.tensors(), job.facts(progress))
    losses = []
    while progress.step < job.limits.last_step:
        report = train_step(job, progress, flags=tuple)
        progress = advance(progress, report, seconds=report.seconds)
        losses.append(report.loss)
    job.checkpoints.save_last(progress.step, job.tensors(), job.facts(progress))
    job.checkpoints.close(is_complete=True)
    job.data.loader.close()
    return tensors if resume else whole_tensors(job), losses


def base_of(world: World, flags: str, cache_dir: Path) -> tuple[int, ...]:
    with a_job(world, flags, cache_dir) as job:
        assert job.base is not None
        return job.base.bit_sums


def test_the_same_weights_are_known_in_any_layout_and_precision(
    pools: Callable[[int], RankPool], cache_dir: Path
) -> None:
    expected = pools(1).run(base_of, lora(), cache_dir)[0]
    for settings in ({"bf16": 1}, {"sharding_strategy": "none"}, {"sharding_strategy": "zero1", "cpu_offload": 1}):
        assert pools(2).run(base_of, lora(**settings), cache_dir) == [expected] * 2
    assert pools(1).run(base_of, lora(seed=1), cache_dir)[0] != expected


def refusal(world: World, flags: str, cache_dir: Path, folder: Path) -> str:
    try:
        some_steps(world, flags, cache_dir, folder, resume=True)
    except HypershardError as error:
        return str(error)
    return ""


def test_a_resumed_run_goes_on_exactly_and_beside_the_same_weights_only(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path
) -> None:
    shape = "--model tiny_llama --num_layers 2 --max_context_width 64"
    write_hf_folder(tmp_path / "hf", shape, cache_dir=cache_dir)
    common = f"{shape} --bf16 1 --lora_r 6 --lr 0.01 --lr_decay_style constant --warmup 0 --init_from {tmp_path / 'hf'}"
    one, two = f"{common} --train_batch_size 2", f"{common} --train_batch_size 1"
    whole = pools(1).run(some_steps, f"{one} --max_steps 5", cache_dir, tmp_path / "whole")[0][1]
    saved, losses = pools(1).run(some_steps, f"{one} --max_steps 3", cache_dir, tmp_path / "run")[0]
    assert losses == whole[:3]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.copytree(tmp_path / "run", tmp_path / "refused")

    _, losses = pools(1).run(resumed, f"{one} --max_steps 5", cache_dir, tmp_path / "run")[0]
    assert losses == whole[3:]
    for tensors, losses in pools(2).run(resumed, f"{two} --max_steps 5", cache_dir, tmp_path / "again"):
        assert tensors.keys() == saved.keys() and all(torch.equal(tensors[name], saved[name]) for name in saved)
        assert losses == pytest.approx(whole[3:], rel=1e-3)  # bfloat16, summed in another order

    found = pools(1).run(refusal, f"{one} --max_steps 5 --lora_alpha 8", cache_dir, tmp_path / "refused")[0]
    assert "--lora_alpha=16.0 (this run: 8.0)" in found
    change_one_weight(tmp_path / "hf")
    found = pools(1).run(refusal, f"{one} --max_steps 5", cache_dir, tmp_path / "refused")[0]
    assert "trained beside other weights" in found and "model.layers.1.mlp.up_proj.weight" in found


def resumed(world: World, flags: str, cache_dir: Path, folder: Path) -> tuple[dict[str, Any], list[float]]:
    return some_steps(world, flags, cache_dir, folder, resume=True)


def change_one_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
