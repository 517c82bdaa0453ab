"""`hypershard plan --calibrate RUN`: a real run measured, and the plan that it narrows."""

import datetime
import json
from pathlib import Path

import pytest
from tests.integration.processes import steps, train_well
from tests.plan_jobs import job_of

from hypershard.cli.plan import run
from hypershard.errors import ConfigError
from hypershard.plan.calibration.calibration import calibrate, installed_software
from hypershard.plan.calibration.measured_run import job_of_run
from hypershard.plan.calibration.store import load_calibrations, save_calibration
from hypershard.plan.estimate import plan
from hypershard.plan.steps import step_time

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    train_well(run_dir=run_dir, nproc_per_node=1, max_steps=24, checkpoint_freq=0, in_memory_checkpointing_freq=0)
    return run_dir


def test_a_run_is_measured_and_narrows_its_own_plan(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "calibrations"
    assert run(["--calibrate", str(run_dir), "--calibrations", str(folder)]) == 0
    page = capsys.readouterr().out
    job = job_of_run(run_dir, told={})
    (kept,) = load_calibrations(folder)
    assert kept.run == "first" and kept.software == installed_software() and kept.gpu == "CPU"
    assert kept.predicted_seconds == step_time(job).seconds and kept.memory_bytes is None
    seconds = sorted(record["step_seconds"] for record in steps(run_dir)[5:])
    assert seconds[0] <= kept.step_seconds <= seconds[-1] and kept.num_steps <= len(seconds) == 19
    for part in ("tokens/s in all", "closed form", f"factor       {kept.factor:.3g}", "narrows", str(folder)):
        assert part in page
    made = plan(job, price=None, dataset_tokens=None, tokens_per_second_per_gpu=None, calibrations=[kept])
    assert made.hours == pytest.approx(24 * kept.step_seconds / 3600)
    assert made.hours_level.startswith("calibrated by first, ")
    assert made.step is not None and made.step.band < step_time(job).band


def test_json_and_what_does_not_go_together(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--calibrate", str(run_dir)]
    assert run([*words, "--calibrations", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["factor"] == pytest.approx(found["step_seconds"] / found["predicted_seconds"])
    with pytest.raises(ConfigError, match="drop --train_batch_size"):
        run([*words, "--train_batch_size", "4"])
    with pytest.raises(ConfigError, match="--calibrations=none keeps nothing"):
        run([*words, "--calibrations", "none"])


def test_plans_read_the_folder_they_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "llama3_8b", "--instance", "p5", "--max_steps", "10", "--calibrations"]
    with pytest.raises(ConfigError, match="there is no such folder"):
        run([*words, str(tmp_path / "missing")])
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"mine\.json is damaged"):
        run([*words, str(tmp_path)])
    assert run([*words, "none"]) == 0
    assert "[closed form, +-30%" in capsys.readouterr().out
    job = job_of("llama3_8b")
    found = calibrate(
        job,
        run="mine",
        step_seconds=[2.0] * 20,
        memory_bytes=None,
        software=installed_software(),
        today=datetime.date(2026, 11, 21),
    )
    save_calibration(found, tmp_path / "good")
    assert run([*words, str(tmp_path / "good")]) == 0
    page = capsys.readouterr().out
    assert "time     2 s a step" in page and page.count("[calibrated by mine, 2026-11-21, +-4%") == 3
