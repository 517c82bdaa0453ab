"""Exports through the command line, checked against transformers itself; killed ones, and ones to a bucket."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hf import MODELS, build, load, parameters
from tests.conftest import BUCKET
from tests.jobs import a_job, config_of
from tests.rank_pool import RankPool
from tests.s3_server import Fault, FaultProxy, Rule, Server
from tiny import manager_of, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypershard.checkpoint import hf
from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.hf_folder import read_model_folder
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import Place
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import DiskStore
from hypershard.cli.main import main
from hypershard.config.schema import CheckpointConfig, Config
from hypershard.config.sources import to_yaml
from hypershard.data.embedded import TOKENIZER_PATH
from hypershard.distributed.process_group import World
from hypershard.models.family import family_of
from hypershard.remote_files import Patience
from hypershard.train.run_dir import belongings, keep
from hypershard.train.state import Progress, advance
from hypershard.train.step import train_step

FAMILIES = ("tiny_llama", "tiny_llama2", "tiny_mistral", "tiny_mixtral", "tiny_qwen2", "tiny_gpt2", "tiny_llama4")


def trained(world: World, flags: str, cache_dir: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    """Train two steps, save what a run saves, and return the weights as FSDP2 holds them."""
    with a_job(world, flags, cache_dir) as job:
        progress = Progress()
        for _ in range(2):
            report = train_step(job, progress, flags=tuple)
            progress = advance(progress, report, seconds=1.0)
        tier = DurableTier(Place(DiskStore(run_dir / "checkpoints")), group=world.checkpoint_group)
        tier.save(2, take_snapshot(job.tensors()), job.facts(progress), Lineage(1, "first"))
        if world.ranks.is_main:
            keep(run_dir, belongings(config_of(flags, cache_dir=cache_dir), job.tokenizer_path))
            (run_dir / "metrics.jsonl").write_text('{"step": 2, "loss": 8.25}\n{"step": 3, "loss": 1.0}\n')
        return {name: one.detach().full_tensor().clone() for name, one in job.parameters.items()}


@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_loads_in_transformers_after_training(
    pools: Callable[[int], RankPool], cache_dir: Path, tmp_path: Path, model: str
) -> None:
    flags = f"--model {model} --num_layers 2 --max_context_width 64 --train_batch_size 2 --bf16 0 --max_steps 5"
    weights = pools(2).run(trained, flags, cache_dir, tmp_path / "run")[0]
    flags = "--dtype float32 --max_shard_gb 0.003 --num_workers 1"
    export(tmp_path / "run", tmp_path / "out", *flags.split())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32).eval()
    expected.load_state_dict(weights, strict=False)
    assert torch.equal(logits(loaded.eval()), logits(expected))
    end = AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id
    ids = loaded.generation_config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (None, end, None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "step 2 of a training" in card and "8.2500 nats per token at step 2" in card and "`embedded`" in card


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10), use_cache=False).logits.float()


def export(run: Path | str, output: Path | str, *flags: str, code: int = 0) -> None:
    assert main(["checkpoint", "export", str(run), "--output", str(output), *flags]) == code


def run_of(name: str, directory: Path) -> Any:
    """A run directory with a checkpoint of random weights of `name`; returns the model."""
    model, _ = build(name)
    tensors = {f"model/{key}": tensor for key, tensor in parameters(model).items()}
    tensors |= {f"optimizer/exp_avg/{key}": torch.ones_like(tensor) for key, tensor in parameters(model).items()}
    section = family_of(MODELS[name].model_type).complete(MODELS[name])
    tier = DurableTier(Place(DiskStore(directory / "checkpoints")))
    tier.save(1, take_snapshot(tensors), {"model": dataclasses.asdict(section)}, Lineage(1, "first"))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_names_and_values_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    run_of(name, tmp_path).save_pretrained(tmp_path / "theirs")
    export(tmp_path, tmp_path / "ours", "--dtype", "float32")
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# A chat model ends its turns with another token than its texts; and what no model may say, or not with such a value.
GENERATION = {
    "eos_token_id": [3, 1, 10**9],
    "bos_token_id": 2,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": "high",
    "custom_generate": "org/code",
    "transformers_version": "4.1",
}


def test_tokenizer_chat_template_and_generation_settings_come_along(tmp_path: Path) -> None:
    model = run_of("llama", tmp_path)
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    export(tmp_path, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight.bfloat16())
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.pad_token_id) == (None, 1, 4)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    expected = {"bos_token_id": 2, "eos_token_id": [1, 3], "pad_token_id": 4, "do_sample": True, "temperature": 0.6}
    assert generation.items() >= expected.items() and not generation.keys() & {"top_p", "custom_generate"}
    assert loaded.generation_config.eos_token_id == [1, 3]
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "do_sample": false, "temperature": 0.6}')
    export(tmp_path, tmp_path / "greedy")  # whose temperature contradicts it: transformers would not save that
    generation = json.loads((tmp_path / "greedy" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 3] and "temperature" not in generation
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a b")["input_ids"] == [2, 3] and tokenizer.eos_token == "<eos>"
    assert tokenizer.chat_template == "{{ messages }}"
    export(tmp_path, tmp_path / "bare", "--tokenizer", str(folder / "tokenizer.json"))
    assert (tmp_path / "bare" / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "<pad>": 4}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_export_looks_like_none_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    run_of("mixtral", tmp_path)
    flags = ("--max_shard_gb", "0.000001", "--num_workers", "1")
    command = [sys.executable, "-m", "hypershard.cli.main", "checkpoint", "export", str(tmp_path), *flags]
    command += ["--output", str(tmp_path / "out"), "--num_workers", "2"]
    journal = tmp_path / "out" / ".export.json"
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and not (journal.exists() and "safetensors" in journal.read_text()):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was killed before its end"
    finished = json.loads(journal.read_bytes())["finished"]
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    export(tmp_path, tmp_path / "out", *flags, "--dtype", "float32", code=2)  # another export does not mix with it
    export(tmp_path, tmp_path / "out", *flags)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in times.items()), "written once"
    export(tmp_path, tmp_path / "other" / "out", *flags)
    assert contents(tmp_path / "out") == contents(tmp_path / "other" / "out")


def test_what_is_in_memory_only_is_exported_too(tmp_path: Path) -> None:
    model, _ = build("llama")
    tensors = {f"model/{name}": tensor for name, tensor in parameters(model).items()}
    manager = manager_of(home=tmp_path / "run" / "checkpoints", memory_dir=tmp_path / "shm")
    section = dataclasses.asdict(family_of("llama_v3").complete(MODELS["llama"]))
    save(manager, 3, tensors, model=section)  # type: ignore[arg-type]
    manager.close(is_complete=False)
    settings = CheckpointConfig(memory_tier_dir=str(tmp_path / "shm"))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(Config(checkpoint=settings)))
    export(tmp_path / "run", tmp_path / "out", "--from", "memory", "--dtype", "float32")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in parameters(model).items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "shm"], "nothing else stays"


def test_damage_and_full_directories_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of("llama", tmp_path)
    export(tmp_path, tmp_path / "checkpoints", code=2)
    assert "exists already; expected a new or empty directory" in capsys.readouterr().err
    (data,) = (tmp_path / "checkpoints").glob("*/*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    export(tmp_path, tmp_path / "out", code=2)
    assert "found checksum" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("own_connections")
def test_a_bucket_takes_and_gives_models(
    tmp_path: Path, s3_server: Server, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written there, and of it read by ranges what a rank needs, through a line that fails now and then."""
    model = run_of("mixtral", tmp_path)
    location = f"s3://{BUCKET}/models/mixtral"
    monkeypatch.setattr(hf, "_BLOCK_BYTES", 8192)
    monkeypatch.setattr(hf, "_IDLE_BYTES", 512)
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.set(Rule(Fault(status=503), method="PUT", words="config.json", times=1))
        export(tmp_path, location, "--dtype", "float32", "--max_shard_gb", "0.00004", "--num_workers", "1")
        puts = [one.path.rsplit("/", 1)[1] for one in proxy.requests("PUT")]
        assert puts[0] == ".export.json" and puts[-1] == "config.json", "last, and once more after the 503"
        patience = Patience(first_wait_seconds=0.01)
        folder = read_model_folder(location, patience=patience)
        assert ".export.json" not in folder.files
        proxy.set(
            Rule(Fault(status=503), words="safetensors", times=1), Rule(Fault(reset="middle"), words="-00002", times=2)
        )
        wanted = {name: torch.zeros_like(tensor) for name, tensor in parameters(model).items()}
        hf.load_hf_weights(folder, wanted, patience=patience)
        assert all(torch.equal(wanted[name], tensor) for name, tensor in parameters(model).items())
        proxy.set()
        rows = wanted["lm_head.weight"]
        part = hf.Part("lm_head.weight", tuple(rows.shape), torch.zeros(7, 9), (50, 3))
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters(model).items()}
        assert list(hf.HfWeights(folder, shapes).fill([part])) == ["lm_head.weight"]
        assert torch.equal(part.local, rows[50:57, 3:12])
        ranges = [
            one.headers["range"].removeprefix("bytes=").split("-") for one in proxy.requests("GET", "safetensors")
        ]
        assert sum(int(last) - int(first) + 1 for first, last in ranges) < 7 * 32 * 4, "no more than these rows"


def test_training_starts_from_a_bucket_with_the_tokenizer_there(
    pools: Callable[[int], RankPool], tmp_path: Path, s3_server: Server, cache_dir: Path
) -> None:
    flags = "--model tiny_llama --num_layers 2 --max_context_width 64 --train_batch_size 2 --bf16 0 --max_steps 5"
    pools(2).run(trained, flags, cache_dir, tmp_path / "run")
    settings = tmp_path / "run" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"added_here": 1}))
    (settings.parent / "chat_template.jinja").write_text("{{ messages }}")
    location = f"s3://{BUCKET}/models/tiny_llama"
    export(tmp_path / "run", location, "--dtype", "float32")
    export(tmp_path / "run", tmp_path / "local", "--dtype", "float32")
    arguments = (flags, cache_dir, dict(os.environ))
    remote = pools(2).run(start, f"--init_from {location}", *arguments)
    local = pools(2).run(start, f"--init_from {tmp_path / 'local'}", *arguments)
    assert remote == local, "the same first loss, the same tokenizer and template"
    assert remote[0][1] == TOKENIZER_PATH.read_bytes() and b"added_here" in remote[0][2] and remote[0][3]


def start(world: World, more: str, flags: str, cache_dir: Path, environment: dict[str, str]) -> tuple[Any, ...]:
    """The first loss, and what a run keeps of its tokenizer."""
    os.environ.update({name: value for name, value in environment.items() if name.startswith("AWS_")})
    with a_job(world, f"{flags} {more}", cache_dir) as job:
        loss = train_step(job, Progress(), flags=tuple).loss
        kept = belongings(config_of(flags, cache_dir=cache_dir), job.tokenizer_path)
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
        return loss, *(kept[f"tokenizer/{name}"] for name in names)


def test_boxes_of_any_shape_are_filled_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "_BLOCK_BYTES", 256)
    monkeypatch.setattr(hf, "_IDLE_BYTES", 64)
    model, _ = build("llama4")
    model.save_pretrained(tmp_path)
    tensors = parameters(model)
    folder = read_model_folder(str(tmp_path))
    weights = hf.HfWeights(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    parts = []
    for name, tensor in tensors.items():
        starts = tuple(size // 3 for size in tensor.shape)
        sizes = [size - start - 1 for size, start in zip(tensor.shape, starts, strict=True)]
        parts.append(hf.Part(name, tuple(tensor.shape), torch.zeros(sizes), starts))
    assert list(weights.fill(iter(parts))) == list(tensors)
    for part in parts:
        box = tuple(slice(start, start + size) for start, size in zip(part.starts, part.local.shape, strict=True))
        assert torch.equal(part.local, tensors[part.name][box]), part.name
    whole = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(tmp_path, whole)
    assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items())
