from __future__ import annotations

import dataclasses
import json
import mmap
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import BUCKET
from tests.s3_server import Server

from hypershard.checkpoint.blob import BlobTable, head_bytes, layout_items, table_bytes
from hypershard.checkpoint.durable import DurableTier
from hypershard.checkpoint.lineage import Lineage
from hypershard.checkpoint.manifest import Place, find_place
from hypershard.checkpoint.memory_files import job_root
from hypershard.checkpoint.metadata import read_metadata, read_tensors
from hypershard.checkpoint.snapshot import take_snapshot
from hypershard.checkpoint.stores import DiskStore
from hypershard.checkpoint.sums import sum_of
from hypershard.cli.main import main
from hypershard.config.schema import CheckpointConfig, Config, ModelConfig
from hypershard.config.sources import to_yaml
from hypershard.models.family import family_of

RUN = "0123456789abcdef"
FIRST = Lineage(1, "first")
SAVED_AT = "2026-01-02T03:04:05+00:00"
FACTS = {"samples": 5}
MODEL = family_of("llama_v3").complete(
    ModelConfig(hidden_width=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=5000, max_context_width=16)
)
MODEL_FACTS = {"model": dataclasses.asdict(MODEL)}


def weights(value: float) -> dict[str, torch.Tensor]:
    specs = family_of("llama_v3").parameters(MODEL)
    return {f"model/{spec.name}": torch.full(spec.shape, value) for spec in specs}


def write_checkpoint(directory: Path, step: int, tensors: dict[str, torch.Tensor], lineage: Lineage = FIRST) -> Path:
    tier = DurableTier(Place(DiskStore(directory)))
    return Path(tier.save(step, take_snapshot(tensors), MODEL_FACTS, lineage).location)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10 and 20 of a tiny model, and an unfinished one of step 30."""
    for step in (10, 20):
        write_checkpoint(tmp_path / "run" / "checkpoints", step, weights(step / 100))
    unfinished = tmp_path / "run" / "checkpoints" / "step-00000030"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"torn")
    (tmp_path / "run" / "checkpoints" / "run-id").write_text(f"{RUN}\n")
    settings = CheckpointConfig(memory_tier_dir=str(tmp_path / "shm"), local_tier_dir=str(tmp_path / "nvme"))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(Config(checkpoint=settings)))
    return tmp_path / "run"


def halves(value: int) -> dict[str, torch.Tensor]:
    """What the parts of `write_blobs` hold together."""
    table = torch.arange(14, dtype=torch.float32).reshape(7, 2) + value
    return {
        "model/table": table,
        "model/half": torch.full((3,), value).bfloat16(),
        "optimizer/count": table[0, 0].long(),
    }


def write_blobs(directory: Path, step: int, parts: tuple[int, ...] = (0, 1), lineage: Lineage = FIRST) -> Path:
    """Blobs of a job of two ranks: the table's rows shared out, a tensor of rank 0 alone, a number that both hold."""
    directory.mkdir(exist_ok=True)
    root = job_root(directory, RUN)
    tensors = halves(step)
    for part, (first, end) in ((0, (0, 4)), (1, (4, 7))):
        if part in parts:
            boxes = [("model/table", (first, 0), tensors["model/table"][first:end])]
            boxes += [("model/half", (0,), tensors["model/half"])] if part == 0 else []
            boxes += [("optimizer/count", (), tensors["optimizer/count"])]
            path = root / "own" / f"rank-{part:05d}" / f"slot-{step % 2}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            table = BlobTable(RUN, lineage, step, part, 2, part, 2, SAVED_AT, FACTS, (), sum_of(b""))
            with open(path, "r+b") as file:  # in place, as slots are: whoever has it mapped sees it change
                file.write(blob(boxes, table))
    return root


def blob(boxes: list[tuple[str, tuple[int, ...], torch.Tensor]], table: BlobTable) -> bytes:
    shapes = {name: tuple(tensor.shape) for name, tensor in halves(0).items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in halves(0).items()}
    items = layout_items(
        [(name, dtypes[name], shapes[name], at, tuple(box.shape), box.nbytes) for name, at, box in boxes]
    )
    payload = bytearray(items[-1].begin + 64)
    for item, (_, _, box) in zip(items, boxes, strict=True):
        payload[item.begin : item.begin + item.size_bytes] = box.reshape(-1).view(torch.uint8).numpy().tobytes()
    content = table_bytes(dataclasses.replace(table, items=tuple(items), payload=sum_of(payload)))
    return head_bytes(content, payload_bytes=len(payload)) + bytes(payload) + content + bytes(99)


def flip_bit(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def load(directory: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stored = find_place(str(directory)).finished()[0]
    tensors = {name: torch.full_like(tensor, 99) for name, tensor in like.items()}
    read_tensors(stored, stored.manifest(), read_metadata(stored, stored.manifest()), tensors)
    return tensors


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_shows_every_checkpoint_and_its_state(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step-00000010" / "__0_0.distcp").write_bytes(b"")
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    header, newest, whole, damaged, _, place = capsys.readouterr().out.splitlines()
    assert header.split() == ["tier", "step", "saved", "size", "ranks", "start", "torch", "state"]
    assert newest.split()[:2] == ["disk", "30"] and "unfinished" in newest
    assert whole.split()[:2] == ["disk", "20"] and whole.split()[-1] == "complete" and torch.__version__ in whole
    assert damaged.split()[:2] == ["disk", "10"] and "found 0 bytes, expected" in damaged
    assert place.split() == ["disk", str(run_dir / "checkpoints")]


def test_list_shows_what_lies_on_this_node_in_the_order_of_a_resume(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-00000030")
    root = write_blobs(tmp_path / "shm", 20)
    write_blobs(tmp_path / "shm", 21, parts=(1,))
    (tmp_path / "nvme").mkdir()
    write_blobs(tmp_path / "nvme", 12, lineage=Lineage(2, "second"))
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    output = capsys.readouterr().out
    rows = [(line.split()[0], line.split()[1]) for line in output.splitlines()[1:6]]
    assert rows == [("local", "12"), ("memory", "21"), ("memory", "20"), ("disk", "20"), ("disk", "10")]
    assert "partial: 1 of 2 parts on this node" in output and f"memory  {root} (this node)" in output
    assert main(["checkpoint", "list", str(run_dir), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["start"] for row in listed["checkpoints"]] == [2, 1, 1, 1, 1]
    assert listed["checkpoints"][2]["state"] == "complete" and listed["checkpoints"][2]["num_ranks"] == 2
    assert listed["checkpoints"][3]["location"].endswith("step-00000020")


def test_list_of_a_run_whose_bucket_is_silent(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = CheckpointConfig(s3_tier_base_path="s3://NO/bucket", memory_tier_dir="/nowhere")
    (run_dir / "config.yaml").write_text(to_yaml(Config(checkpoint=settings)))
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert "silent  s3://NO/bucket cannot be asked" in capsys.readouterr().out
    (run_dir / "config.yaml").write_text("nonsense: 1\n")
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert "unknown key 'nonsense'" in capsys.readouterr().out


def test_list_follows_checkpoint_dir_of_the_configuration(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
    settings = CheckpointConfig(checkpoint_dir=str(tmp_path / "elsewhere"), memory_tier_dir=str(tmp_path / "shm"))
    (run_dir / "config.yaml").write_text(to_yaml(Config(checkpoint=settings)))
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert str(tmp_path / "elsewhere") in capsys.readouterr().out


def test_list_needs_no_torch(run_dir: Path, tmp_path: Path) -> None:
    write_blobs(tmp_path / "shm", 20)
    code = (
        "import sys; from hypershard.cli.checkpoint import run; "
        f"run(['list', {str(run_dir)!r}]); assert not {{'torch', 'boto3', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_names_the_damage_and_fails(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count(": valid") == 2
    path = run_dir / "checkpoints" / "step-00000010" / "__0_0.distcp"
    flip_bit(path)
    assert main(["checkpoint", "list", str(run_dir)]) == 0, "sizes are right; only reading every byte finds it"
    assert main(["checkpoint", "verify", str(run_dir)]) == 2
    captured = capsys.readouterr()
    assert f"{path}: found checksum" in captured.out and "1 of 2 checkpoints are damaged" in captured.err
    assert main(["checkpoint", "verify", str(run_dir), "--step", "20"]) == 0
    assert main(["checkpoint", "verify", str(path.parent)]) == 2


def test_verify_reads_the_blobs_on_this_node(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_blobs(tmp_path / "shm", 20)
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert "memory step 20 (start 1): valid (2 of 2 parts on this node" in capsys.readouterr().out
    slot = root / "own" / "rank-00001" / "slot-0"
    flip_bit(slot, at=4096)
    assert main(["checkpoint", "verify", str(run_dir), "--step", "20"]) == 2
    assert f"{slot}: found checksum" in capsys.readouterr().out
    flip_bit(slot, at=4096)
    flip_bit(slot, at=slot.stat().st_size - 120)
    assert main(["checkpoint", "verify", str(run_dir)]) == 2
    assert f"damaged: {slot}: its table of contents is damaged" in capsys.readouterr().out


# --- copy ------------------------------------------------------------------------------------------------------------


def test_copy_is_the_same_checkpoint_with_what_belongs_to_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    target = tmp_path / "copy"
    (target / "step-00000020").mkdir(parents=True)
    (target / "step-00000020" / "left").write_bytes(b"torn")
    assert main(["checkpoint", "copy", str(run_dir), str(target)]) == 0
    assert "3 files" in (output := capsys.readouterr().out)
    assert "with it run-id, config.yaml, tokenizer/tokenizer.json" in output
    original = run_dir / "checkpoints" / "step-00000020"
    assert {path.name for path in (target / "step-00000020").iterdir()} == {path.name for path in original.iterdir()}
    for path in original.iterdir():
        assert (target / "step-00000020" / path.name).read_bytes() == path.read_bytes()
    assert (target / "run-id").read_text() == f"{RUN}\n"
    assert main(["checkpoint", "copy", str(run_dir), str(target)]) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(["checkpoint", "copy", str(run_dir), str(target), "--step", "10"]) == 0
    assert same(load(target / "step-00000010", weights(9.0)), weights(0.1))


def test_copy_never_takes_damage_along_nor_the_place_of_another(run_dir: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", 20, weights(7.0), Lineage(3, "else"))
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    assert main(["checkpoint", "copy", str(run_dir), str(tmp_path / "other")]) == 2
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    flip_bit(run_dir / "checkpoints" / "step-00000020" / "__0_0.distcp")
    assert main(["checkpoint", "copy", str(run_dir), str(tmp_path / "copy")]) == 2
    assert not list((tmp_path / "copy").iterdir()), "half a copy must not stay"


def test_copy_passes_over_a_broken_newest_one_and_says_so(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "checkpoints" / "step-00000020" / "__0_0.distcp").unlink()
    assert main(["checkpoint", "copy", str(run_dir), str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "step-00000010" / "MANIFEST.json").exists()
    assert "step-00000020 is passed over, it is damaged" in caplog.text


def test_copy_to_a_bucket_and_back(
    run_dir: Path, tmp_path: Path, s3_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = f"s3://{BUCKET}/cli/demo"
    assert main(["checkpoint", "copy", str(run_dir), bucket]) == 0
    assert main(["checkpoint", "verify", bucket]) == 0
    assert f"{bucket}/step-00000020: valid" in capsys.readouterr().out
    assert main(["checkpoint", "copy", f"{bucket}/step-00000020", str(tmp_path / "back")]) == 0
    original = run_dir / "checkpoints" / "step-00000020"
    for path in original.iterdir():
        assert (tmp_path / "back" / "step-00000020" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "back" / "config.yaml").exists()
    assert main(["checkpoint", "diff", f"{run_dir}@20", bucket]) == 0
    assert main(["checkpoint", "copy", str(run_dir), bucket, "--step", "10"]) == 0
    settings = CheckpointConfig(s3_tier_base_path=bucket, memory_tier_dir=str(tmp_path / "shm"))
    (run_dir / "config.yaml").write_text(to_yaml(Config(checkpoint=settings)))
    capsys.readouterr()
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("s3 ")] == [
        ["s3", "20"],
        ["s3", "10"],
        ["s3", bucket],
    ]
    assert main(["checkpoint", "prune", bucket, "--keep", "1"]) == 0
    assert [one.step for one in find_place(bucket).stored()] == [20]


@pytest.mark.parametrize("tier", ["memory", "local"])
def test_copy_puts_a_checkpoint_together_from_this_nodes_blobs(run_dir: Path, tmp_path: Path, tier: str) -> None:
    directory = tmp_path / ("shm" if tier == "memory" else "nvme")
    directory.mkdir()
    write_blobs(directory, 41, parts=(0,))
    write_blobs(directory, 40)
    assert main(["checkpoint", "copy", str(run_dir), str(tmp_path / "copy"), "--from", tier]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "copy")]) == 0
    stored = find_place(str(tmp_path / "copy")).finished()[0]
    manifest = stored.manifest()
    assert (manifest.step, manifest.lineage, manifest.world_size) == (40, FIRST, 2)
    assert manifest.saved_at == SAVED_AT
    assert stored.facts(manifest) == {**FACTS, "step": 40}
    assert {"__0_0.distcp", "__1_0.distcp"} < manifest.files.keys()
    assert same(load(Path(stored.location), halves(0)), halves(40))


def test_blobs_that_are_damaged_or_partial_make_no_checkpoint(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["checkpoint", "copy", str(run_dir), str(tmp_path / "copy"), "--from", "memory"]
    assert main(command) == 2
    assert "no blob of this run on this node" in capsys.readouterr().err
    root = write_blobs(tmp_path / "shm", 41, parts=(0,))
    assert main(command) == 2
    assert "found 1 of 2 parts of step 41" in capsys.readouterr().err
    write_blobs(tmp_path / "shm", 41)
    flip_bit(root / "own" / "rank-00001" / "slot-1", at=4096 + 3)
    assert main(command) == 2
    assert "found checksum" in capsys.readouterr().err
    assert not list((tmp_path / "copy").iterdir())


def test_a_blob_written_anew_while_it_is_copied_is_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hypershard.checkpoint import assemble

    write_blobs(tmp_path / "shm", 40)
    write = assemble.write_part

    def overtaken(*arguments, **named):
        write_blobs(tmp_path / "shm", 42)
        return write(*arguments, **named)

    monkeypatch.setattr(assemble, "write_part", overtaken)
    assert main(["checkpoint", "copy", str(run_dir), str(tmp_path / "copy"), "--from", "memory"]) == 2
    assert "was written anew while it was read" in capsys.readouterr().err
    assert not list((tmp_path / "copy").iterdir())


# --- prune -----------------------------------------------------------------------------------------------------------


def test_prune_keeps_the_newest_and_says_what_goes(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run_dir / "checkpoints"
    write_checkpoint(directory, 40, weights(4), Lineage(1, "first"))
    (directory / "step-00000030").mkdir(exist_ok=True)
    write_checkpoint(directory, 20, weights(5), Lineage(2, "second"))
    write_checkpoint(directory, 25, weights(6), Lineage(2, "second"))
    (directory / "step-00000050").mkdir()
    command = ["checkpoint", "prune", str(run_dir), "--keep", "1", "--keep_every", "20"]
    assert main([*command, "--dry_run"]) == 0
    assert capsys.readouterr().out.count("would delete") == 3
    assert len(list(directory.glob("step-*"))) == 6
    assert main(command) == 0
    output = capsys.readouterr().out
    assert re.search(r"step-00000010 \(.*\): 1 newer ones are kept", output)
    assert re.search(r"step-00000020 \(.*\): step 20 was saved again", output)
    assert re.search(r"step-00000040 \(.*\): abandoned: the run went back behind it and is at step 25", output)
    assert "left alone" in output
    left = ["step-00000020.2", "step-00000025", "step-00000050"]
    assert sorted(path.name for path in directory.glob("step-*")) == left
    assert main([*command, "--unfinished"]) == 0
    assert sorted(path.name for path in directory.glob("step-*")) == left[:2]


def test_prune_memory_spares_what_is_in_use_or_recent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hypershard.cli import checkpoint_memory

    root = write_blobs(tmp_path / "shm", 20)
    command = ["checkpoint", "prune", "--memory", "--memory_tier_dir", str(tmp_path / "shm")]
    assert main([*command, "--yes"]) == 0
    assert "its job may come back for it" in capsys.readouterr().out and root.exists()
    monkeypatch.setattr(checkpoint_memory, "RECENT_SECONDS", 0.0)
    slot = root / "own" / "rank-00000" / "slot-0"
    with open(slot, "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert main([*command, "--run", RUN, "--yes"]) == 0
        assert re.search(r"in use: process \d+ has it mapped", capsys.readouterr().out) and slot.exists()
    import fcntl

    with open(root / "agent.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([*command, "--yes"]) == 0
        assert "in use: its agent is alive" in capsys.readouterr().out and slot.exists()
    assert main(command) == 0
    assert "up to step 20" in (output := capsys.readouterr().out) and "with --yes" in output and slot.exists()
    assert main([*command, "--yes"]) == 0
    assert "deleted" in capsys.readouterr().out and not root.exists()


# --- diff ------------------------------------------------------------------------------------------------------------


def test_diff_finds_what_differs_across_numbers_of_ranks(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One side is one file, the other was put together from two parts: no box of the table is the same on both."""
    write_blobs(tmp_path / "shm", 40)
    assert main(["checkpoint", "copy", str(run_dir), str(tmp_path / "two"), "--from", "memory"]) == 0
    changed = halves(40)
    write_checkpoint(tmp_path / "one", 40, changed)
    weights_only = ["--tensors", "*"]
    capsys.readouterr()
    assert main(["checkpoint", "diff", str(tmp_path / "one"), str(tmp_path / "two"), *weights_only]) == 0
    assert "equal: 3 tensors" in capsys.readouterr().out
    changed["model/table"][5, 1] += 0.5
    changed["model/table"][0, 0] = float("nan")
    changed["optimizer/count"] += 1
    write_checkpoint(tmp_path / "changed", 40, changed)
    assert main(["checkpoint", "diff", str(tmp_path / "two"), str(tmp_path / "changed")]) == 1
    output = capsys.readouterr().out
    assert (
        re.search(r"fact samples: 5 -> \(not there\)", output)
        and "fact model.hidden_width: (not there) -> 16" in output
    )
    table, count = (line.split() for line in output.splitlines() if "of 14 " in line or "1 of 1 " in line)
    assert table == ["inf", "inf", "inf", "2", "of", "14", "model/table"]
    assert count == ["0.0244", "0.0244", "1", "1", "of", "1", "optimizer/count"]
    assert main(["checkpoint", "diff", str(tmp_path / "two"), str(tmp_path / "changed"), "--tensors", "*half"]) == 0
    assert main(["checkpoint", "diff", str(tmp_path / "two"), str(tmp_path / "changed"), "--tensors", "x*"]) == 2


def test_diff_of_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "a", 1, {"model/x": torch.ones(3), "model/y": torch.ones(2), "model/a": torch.ones(1)})
    write_checkpoint(tmp_path / "b", 1, {"model/x": torch.ones(3).half(), "model/y": torch.ones(4)})
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    output = capsys.readouterr().out
    assert "model/x: (3,) float32 -> (3,) float16" in output and "model/y: (2,) float32 -> (4,) float32" in output
    assert "- model/a" in output.splitlines()
    write_checkpoint(tmp_path / "c", 1, {"model/x": torch.zeros(3).half(), "model/y": torch.ones(4)})
    assert main(["checkpoint", "diff", str(tmp_path / "b"), str(tmp_path / "c")]) == 1
    assert main(["checkpoint", "diff", str(tmp_path / "b"), str(tmp_path / "c"), "--no_values"]) == 0


def test_diff_reads_nothing_that_is_equal_by_its_sums(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir / "checkpoints" / "step-00000020", tmp_path / "copy" / "step-00000020")
    (tmp_path / "copy" / "step-00000020" / "__0_0.distcp").write_bytes(b"")
    place = run_dir / "checkpoints"
    damaged = str(tmp_path / "copy" / "step-00000020")
    assert main(["checkpoint", "diff", f"{place}@20", damaged]) == 2, "sizes tell"
    content = (place / "step-00000020" / "__0_0.distcp").read_bytes()
    (tmp_path / "copy" / "step-00000020" / "__0_0.distcp").write_bytes(bytes(len(content)))
    capsys.readouterr()
    assert main(["checkpoint", "diff", f"{place}@20", damaged]) == 0, "the zeros are not looked at"
    num_tensors = len(weights(0))
    assert f"equal: {num_tensors} tensors, {num_tensors} of them by their checksums" in capsys.readouterr().out
    assert main(["checkpoint", "diff", f"{place}@10", damaged]) == 2, "and are found when they are"


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "value"), [([], 0.2), (["--step", "10"], 0.1)])
def test_export_loads_in_transformers(run_dir: Path, tmp_path: Path, step: list[str], value: float) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hypershard.data

    embedded = Path(hypershard.data.__file__).parent / "embedded"
    output = tmp_path / "model"
    flags = ["--output", str(output), "--dtype", "float32", "--tokenizer", str(embedded), *step]
    assert main(["checkpoint", "export", str(run_dir), *flags]) == 0
    weight = AutoModelForCausalLM.from_pretrained(output).model.embed_tokens.weight
    assert torch.equal(weight, torch.full((5000, 16), value))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.decode(tokenizer("for i in range(3):")["input_ids"]) == "for i in range(3):"
    assert tokenizer.eos_token is not None


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{run}", "--step", "15"], "--step=15: .* has steps 20, 10"),
        (["list", "{run}/nothing"], "no such directory"),
        (["list", "{run}/../shm"], "found no checkpoint"),
        (["verify", "{run}/checkpoints/step-00000030"], "is unfinished: being written now, or cut off"),
        (["export", "{run}", "--output", "{run}"], "--output=.*exists already"),
        (["copy", "{run}", "{run}/x/step-00000010"], "names one checkpoint; expected the folder"),
        (["copy", "{run}", "{run}"], "is where the checkpoint lies"),
        (["copy", "{run}/checkpoints/step-00000020", "{run}/x", "--from", "memory"], "expected a run directory"),
        (["prune", "{run}"], "prune takes a PLACE and --keep K, or --memory"),
        (["prune", "{run}", "--keep", "1", "--yes"], "belong to prune --memory"),
        (["prune", "{run}", "--memory"], "takes no PLACE"),
        (["prune", "{run}/checkpoints/step-00000020", "--keep", "1"], "is one checkpoint; expected the folder"),
        (["prune", "--memory", "--memory_tier_dir", "{run}", "--run", "x"], "--run=x: holds nothing"),
        (["diff", "{run}@15", "{run}"], "--step=15|has steps 20, 10"),
        (["list", "s3://b"], "is no bucket name"),
    ],
)
def test_mistakes_are_explained(
    run_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir.parent / "shm").mkdir()
    assert main(["checkpoint", *(text.format(run=run_dir) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["checkpoint", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "hypershard checkpoint export runs/demo --output models/demo" in shown
    assert "exit code 0 equal, 1 different" in shown
    with pytest.raises(SystemExit) as stop:
        main(["checkpoint", "prune", "runs/demo", "--keep", "0"])
    assert stop.value.code == 2 and "expected a whole number from 1 on" in capsys.readouterr().err
