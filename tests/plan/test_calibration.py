"""Calibrations: what is kept of a run, which one a plan takes, and how it enters time, dollars, band and level."""

import dataclasses
import datetime
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.plan_jobs import job_of as job

from hypershard.catalog.instances import Price
from hypershard.errors import ConfigError
from hypershard.plan.calibration.calibration import (
    Calibration,
    Match,
    calibrate,
    calibrated,
    closed_form_state,
    installed_software,
    nearest,
)
from hypershard.plan.calibration.store import default_folder, load_calibrations, save_calibration
from hypershard.plan.estimate import Plan, as_dict, plan
from hypershard.plan.job import Job
from hypershard.plan.steps import LEVEL, coefficients, step_time

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SOFTWARE = installed_software()
DAY = datetime.date(2026, 11, 21)
PRICE = Price(dollars_per_hour=10.0, kind="given", region=None, date=None, source="here")


def measured_at(factor: float, ran: Job, *, run: str = "run", day: datetime.date = DAY) -> Calibration:
    """As if `ran` had taken `factor` times the closed form's seconds, every step the same."""
    seconds = step_time(ran).seconds * factor
    return calibrate(ran, run=run, step_seconds=[seconds] * 20, memory_bytes=None, software=SOFTWARE, today=day)


def planned(of: Job, *calibrations: Calibration, speed: float | None = None) -> Plan:
    return plan(of, price=PRICE, dataset_tokens=None, tokens_per_second_per_gpu=speed, calibrations=calibrations)


def match(of: Job, *calibrations: Calibration, software: str = SOFTWARE) -> Match:
    found = nearest(of, calibrations, software=software)
    assert found is not None
    return found


def test_first_and_slow_steps_are_left_out() -> None:
    settled = [0.9, 1.0, 1.1] * 4
    found = calibrate(
        job("llama3_8b"),
        run="run",
        step_seconds=[50.0, 9.0, 2.0, 2.0, 2.0, *settled, 3.5, 30.0],
        memory_bytes=7.0,
        software=SOFTWARE,
        today=DAY,
    )
    assert (found.num_steps, found.step_seconds, found.memory_bytes) == (12, 1.0, 7.0)
    assert 0.1 < found.iqr_seconds < 0.21
    assert found.factor == pytest.approx(1.0 / step_time(job("llama3_8b")).seconds)


@pytest.mark.parametrize(("num_steps", "left"), [(14, 9), (3, 0), (0, 0)])
def test_too_few_steps_are_refused_with_their_number_and_the_flag(num_steps: int, left: int) -> None:
    with pytest.raises(ConfigError, match=rf"{num_steps} steps were logged, of which {left} are left.*--logging_freq"):
        calibrate(
            job("llama3_8b"),
            run="run",
            step_seconds=[1.0] * num_steps,
            memory_bytes=None,
            software=SOFTWARE,
            today=DAY,
        )


def test_hours_dollars_mfu_band_and_level_follow() -> None:
    of = job("llama3_8b", num_nodes=2, max_steps=1000)
    plain, found = planned(of), planned(of, measured_at(1.5, of, run="first"))
    assert plain.step and found.step and plain.hours and found.hours and found.cost.dollars and plain.cost.dollars
    assert found.hours == pytest.approx(1.5 * plain.hours)
    assert found.cost.dollars == pytest.approx(1.5 * plain.cost.dollars)
    assert found.step.mfu == pytest.approx(plain.step.mfu / 1.5)
    assert sum(found.step.parts.values()) == pytest.approx(found.step.seconds)
    assert found.step.band == 0.04 < plain.step.band
    level = "calibrated by first, 2026-11-21"
    assert (plain.hours_level, found.hours_level) == (LEVEL, level)
    assert as_dict(found)["time"]["level"] == level
    given = planned(of, measured_at(1.5, of), speed=5000.0)
    assert given.hours_level == "measured speed"
    assert given.hours == pytest.approx(1000 * of.step_tokens / of.num_gpus / 5000 / 3600)


def test_the_nearest_run_is_taken_and_the_band_grows_with_the_distance() -> None:
    of = job("llama3_8b")
    same = measured_at(1.1, of, run="same")
    near = measured_at(1.2, job("llama3_8b", max_context_width=4096, activation_checkpointing="full"), run="near")
    nearer = measured_at(1.25, job("llama3_8b", train_batch_size=2), run="nearer")
    other = measured_at(1.3, job("gpt2_1_36b"), run="other")
    another_gpu = measured_at(1.4, job("llama3_8b", "p4de"), run="p4de")
    assert match(of, other, near, same, nearer, another_gpu) == Match(same, 0.04, is_same=True)
    assert match(of, other, near, nearer, another_gpu) == Match(nearer, 0.12, is_same=False)
    assert match(of, other, another_gpu) == Match(other, 0.25, is_same=False)
    assert nearest(of, [another_gpu], software=SOFTWARE) is None
    tiny = measured_at(50.0, job("tiny_llama"), run="tiny")  # its kernels take less time than their launching
    assert nearest(of, [tiny], software=SOFTWARE) is None
    assert match(job("tiny_llama", train_batch_size=4), tiny).calibration == tiny
    other_peak = measured_at(1.1, job("llama3_8b", train_batch_size=2, peak_tflops_per_gpu=300.0))
    assert nearest(of, [other_peak], software=SOFTWARE) is None
    assert match(job("llama3_8b", gradient_accumulation_steps=64), same).band == 0.12
    step = calibrated(step_time(of), of, [near], software=SOFTWARE)
    assert step.seconds == pytest.approx(1.2 * step_time(of).seconds)
    assert any("as run near took" in text for text in step.assumptions)
    newer = measured_at(1.15, of, run="newer", day=DAY + datetime.timedelta(days=1))
    assert match(of, same, newer).calibration.run == match(of, newer, same).calibration.run == "newer"


def test_other_software_and_noisy_steps_widen_the_band() -> None:
    of = job("llama3_8b")
    one = dataclasses.replace(measured_at(1.1, of), software="torch 2.13.0, hypershard 0.1.0")
    assert match(of, one, software="torch 2.14.0, hypershard 0.1.0").band == 0.12
    assert match(of, one, software="torch unknown, hypershard 0.1.0").band == 0.04
    newer = dataclasses.replace(one, software="torch 2.14.0, hypershard 0.1.0", run="newer")
    assert match(of, one, newer, software=newer.software).calibration.run == "newer"
    noisy = dataclasses.replace(one, iqr_seconds=one.step_seconds / 2)
    assert match(of, noisy, software=one.software).band == pytest.approx(0.25)


def test_after_a_change_of_the_closed_form_a_run_counts_for_its_own_settings_alone() -> None:
    ran, like = job("llama3_8b"), job("llama3_8b", num_nodes=2)
    seconds = step_time(ran).seconds
    old = dataclasses.replace(measured_at(1.5, ran), closed_form="another", predicted_seconds=seconds / 7)
    assert old.closed_form != closed_form_state()
    assert calibrated(step_time(ran), ran, [old], software=SOFTWARE).seconds == pytest.approx(1.5 * seconds)
    step = calibrated(step_time(like), like, [old], software=SOFTWARE)
    assert step.seconds == step_time(like).seconds and step.level == LEVEL
    assert any("the closed form has changed since" in text for text in step.assumptions)


def test_published_runs_predict_each_other_within_the_band() -> None:
    """Each published row from its nearest neighbour: over 9 of 10 within the band of near ones, with no row fed in."""
    fitting = _fitting()
    content = fitting.rows()
    rows = []
    for row in content["fit"]:
        ran = fitting.job_of(row, content["models"])
        rows.append((ran, ran.step_tokens / row["num_gpus"] / row["tokens_per_second_per_gpu"]))
    found = [measured_at(seconds / step_time(ran).seconds, ran) for ran, seconds in rows]
    errors = []
    for (ran, seconds), own in zip(rows, found, strict=True):
        others = [one for one in found if one.setup != own.setup]
        if (one := match(ran, *others)).band == 0.12:
            errors.append(abs(step_time(ran).seconds * one.calibration.factor / seconds - 1))
    assert len(errors) > 40
    assert sum(error <= 0.12 for error in errors) / len(errors) > 0.9
    assert sum(errors) / len(errors) < 0.04


def test_the_factors_of_a_cpu_are_those_of_its_benchmark() -> None:
    found = json.loads((BENCHMARKS / "results" / "cpu_factors.json").read_text())["factors"]
    kept = coefficients()["fitted"]["cpu"]["factors"]
    assert kept["products"] == kept["attention"] == pytest.approx(found["products"], abs=0.005)
    assert kept["memory"] == kept["logits"] == pytest.approx(found["memory"], abs=0.005)


def _fitting() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fit_speeds", BENCHMARKS / "fit_speeds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = measured_at(1.1, job("llama3_8b"), run="a run/of mine")
    other = measured_at(1.2, job("llama3_2_1b"), run="a run/of mine")
    folder = tmp_path / "deep" / "calibrations"
    assert load_calibrations(folder) == ()
    assert save_calibration(one, folder) != save_calibration(other, folder)
    again = dataclasses.replace(one, step_seconds=3.0)
    assert save_calibration(again, folder).name.startswith("a-run-of-mine-")
    assert set(load_calibrations(folder)) == {again, other}
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "hypershard" / "calibrations"


@pytest.mark.parametrize(
    "change",
    [
        None,
        {"step_seconds": 0.0},
        {"step_seconds": float("nan")},
        {"step_seconds": "1.0"},
        {"predicted_seconds": None},
        {"more": 1},
        {"setup": {}},
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: dict[str, Any] | None) -> None:
    path = save_calibration(measured_at(1.1, job("llama3_8b")), tmp_path)
    content = json.loads(path.read_text())
    path.write_text(path.read_text()[:-20] if change is None else json.dumps({**content, **change}))
    with pytest.raises(ConfigError, match=rf"{path.name} is damaged.*--calibrations=none"):
        load_calibrations(tmp_path)
