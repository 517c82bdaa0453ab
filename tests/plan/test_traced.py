"""The traced verdict from the side that knows no torch: asked, kept, refused, and said on the page."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.plan_jobs import job_of

from hypershard.cli.main import main
from hypershard.plan import bytes as memory
from hypershard.plan.here import this_machine
from hypershard.plan.job import Job
from hypershard.plan.traced import CannotTrace, Traced, traced_memory

TINY = ("--model", "tiny_llama2", "--instance", "p5", "--max_steps", "10")


def tiny(**flags: Any) -> Job:
    return job_of("tiny_llama2", "p5", 1, **flags)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Traced, Path]:
    """A trace, and the folder it is kept in."""
    folder = tmp_path_factory.mktemp("cache") / "traced"
    return traced_memory(tiny(), cache_dir=folder), folder


@pytest.mark.slow
def test_a_trace_is_a_verdict(kept: tuple[Traced, Path]) -> None:
    traced = kept[0]
    assert traced.fit.verdict == "fits"
    assert traced.needed_bytes == traced.reserved_bytes + memory.OUTSIDE_BYTES
    assert traced.active_bytes <= sum(traced.stream_bytes.values()) <= traced.reserved_bytes
    assert {"start", "forward", "loss", "backward", "optimizer's step"} <= {one.name for one in traced.moments}
    assert sum(traced.categories.values()) == traced.active_bytes


@pytest.mark.slow
def test_an_answer_is_kept_for_its_question_alone(kept: tuple[Traced, Path]) -> None:
    traced, folder = kept
    again = traced_memory(tiny(seed=7), cache_dir=folder)  # which allocates nothing
    assert again.was_kept and not traced.was_kept
    assert dataclasses.replace(again, seconds=0.0) == dataclasses.replace(traced, seconds=0.0, was_kept=True)
    assert len(list(folder.iterdir())) == 1
    with pytest.raises(CannotTrace, match=r"took longer than 0\.01 s"):
        traced_memory(tiny(train_batch_size=2), cache_dir=folder, timeout_seconds=0.01)
    for path in folder.iterdir():  # half an answer is none
        path.write_text(path.read_text()[:20])
    assert not traced_memory(tiny(), cache_dir=folder).was_kept


@pytest.mark.slow
def test_a_process_that_fails_is_quoted() -> None:
    """A model without a vocabulary, which no plan gets here with."""
    job = dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, vocab_size=None))
    with pytest.raises(CannotTrace, match=r"the trace ended by exit code 1: .*--vocab_size is open"):
        traced_memory(job, cache_dir=None)


def test_what_has_no_trace_is_refused() -> None:
    with pytest.raises(CannotTrace, match="--compile=1"):
        traced_memory(tiny(compile=True), cache_dir=None)
    with pytest.raises(CannotTrace, match="nf4"):
        traced_memory(tiny(lora_r=8, bnb_quant_type="nf4"), cache_dir=None)
    with pytest.raises(CannotTrace, match="--objective=dpo"):
        traced_memory(tiny(lora_r=8, objective="dpo"), cache_dir=None)
    machine = this_machine(instance_type="", gpu_name=None, gpu_memory_mib=None, num_ranks=1)
    with pytest.raises(CannotTrace, match="no GPU"):
        traced_memory(dataclasses.replace(tiny(), instance=machine), cache_dir=None)


def test_without_a_trace_the_page_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--traced", "--compile=1"]) == 0
    shown = capsys.readouterr()
    assert "not traced: --compile=1 cannot be traced" in shown.out and "the verdict is the closed form's" in shown.err
    assert "verdict  fits" in shown.out
    assert main(["plan", *TINY, "--traced", "--search"]) == 2
    assert "--traced looks at the memory of one plan and does nothing with --search" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_and_the_json_tell_it(tmp_path: Path) -> None:
    """In a process of its own, which shows that the planner itself loads no torch."""
    program = (
        "import sys; from hypershard.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = (sys.executable, "-c", program, "plan", *TINY, "--traced", f"--cache_dir={tmp_path}")
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "tracing" in page.stderr and "[traced, +-5%" in page.stdout
    values = subprocess.run((*command, "--json"), capture_output=True, text=True, timeout=120, check=True)
    traced = json.loads(values.stdout)["memory"]["traced"]
    assert traced["was_kept"] and traced["verdict"] == "fits" and traced["level"] == "traced"
