"""The text of job files: in step with the template, safe whatever the values, right for every instance."""

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hypershard.catalog.instances import families, instances
from hypershard.cli import launch
from hypershard.errors import ConfigError
from hypershard.launch.build import build_job
from hypershard.launch.job import Job
from hypershard.launch.slurm import SlurmOptions, render
from hypershard.launch.slurm_files import PLANS, file_text, plan_for, write_all
from hypershard.models.files import available_models

REPOSITORY = Path(__file__).parents[2]
NASTY = "a b'c\"d$HOME`date`}\\;#*~{x,y}!"


def job(**changes: object) -> Job:
    asked = {
        "train_flags": ("--train_batch_size=2",),
        "model_name": "llama3_8b",
        "instance": "p5",
        "num_nodes": 4,
        "run_dir": "runs/%x-%j",
        "hours": 13.5,
        "image": None,
        "max_restarts": 3,
        "name": None,
        "extra_environment": {},
    }
    return build_job(**{**asked, **changes})  # type: ignore[arg-type]


def lines(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


def settings(text: str, *show: str, **variables: str) -> list[str]:
    """The values of shell variables after the script's part that sets them, run by bash as on a node."""
    upto = text.index("container=()")
    script = text[:upto] + "".join(f'printf "%s\\0" "{name}"\n' for name in show)
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "demo", **variables}
    done = subprocess.run(
        ["bash", "-c", script, __file__], env=environment, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.split("\0")[:-1]


def test_files_are_in_step_with_the_template() -> None:
    """`hypershard launch slurm --write slurm/` writes them."""
    found = {path.stem: path.read_text() for path in (REPOSITORY / "slurm").glob("*.sbatch")}
    assert sorted(found) == available_models()
    for model, text in found.items():
        assert text == file_text(model), f"slurm/{model}.sbatch is old: hypershard launch slurm --write slurm/"


def test_a_model_without_a_plan_is_named() -> None:
    with pytest.raises(ConfigError, match="model new_9b: found no plan"):
        file_text("new_9b")


def test_every_model_has_nodes_that_hold_it() -> None:
    """16 bytes a parameter in at most a quarter of the GPUs' memory."""
    billions = {
        "llama2_7b": 6.74, "llama2_13b": 13.0, "llama2_70b": 69.0, "llama3_8b": 8.03, "llama3_1_8b": 8.03,
        "llama3_1_70b": 70.6, "llama3_2_1b": 1.24, "llama3_2_3b": 3.21, "mathstral_7b": 7.25, "mixtral_8x7b": 46.7,
        "deepseek_r1_distill_qwen_32b": 32.8, "llama4_scout_17b_16e": 107.8, "llama_1_36b": 1.29, "gpt2_1_36b": 1.41,
    }  # fmt: skip
    assert set(PLANS) == {name for name in available_models() if not name.startswith("tiny_")} == set(billions)
    by_name = {row.name: row for row in instances()}
    for model, size in billions.items():
        plan = plan_for(model)
        row = by_name[str(plan.instance)]
        gib = plan.num_nodes * row.num_gpus * row.gpu_memory_mib / 1024
        assert size * 1e9 * 16 / 2**30 <= gib / 4, model


def test_directives() -> None:
    options = SlurmOptions(directives=(("partition", "gpu"), ("constraint", "p5|p5en")), save_seconds=240)
    found = lines(render(job(), options))
    assert found == [
        "job-name=llama3-8b-p5-x4",
        "nodes=4",
        "ntasks-per-node=1",
        "exclusive",
        "mem=0",
        "gpus-per-node=8",
        "time=0-13:30:00",
        "output=%x-%j.out",
        "open-mode=append",
        "requeue",
        "signal=B:USR1@300",
        "partition=gpu",
        "constraint=p5|p5en",
    ]
    assert not any("gpus" in line for line in lines(render(job(), SlurmOptions(counts_gpus=False))))
    assert not any("gpus" in line for line in lines(render(job(instance=None), SlurmOptions())))
    with pytest.raises(ConfigError, match="--partition=a b"):
        render(job(), SlurmOptions(directives=(("partition", "a b"),)))
    with pytest.raises(ConfigError, match="--save_seconds says this"):
        render(job(extra_environment={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "500"}), SlurmOptions())
    with pytest.raises(ConfigError, match="in one line"):
        render(job(), SlurmOptions(file="a\nrm b"))
    with pytest.raises(ConfigError, match="--save_seconds=0"):
        render(job(), SlurmOptions(save_seconds=0))


def test_times_are_rounded_up() -> None:
    def time(hours: float) -> str:
        return next(line for line in lines(render(job(hours=hours), SlurmOptions())) if line.startswith("time="))

    assert time(0.001) == "time=0-00:01:00"
    assert time(24) == "time=1-00:00:00"
    assert time(71.999) == "time=3-00:00:00"


def test_nothing_in_a_value_is_run_by_the_shell(tmp_path: Path) -> None:
    made = dataclasses.replace(
        job(run_dir=f"{tmp_path}/{NASTY}"),
        train_flags=("--model=llama3_8b", f"--dataset={NASTY}", f"--run_dir={tmp_path}/{NASTY}"),
        environment={"SAID": NASTY, "TRACE": f"{tmp_path}/{NASTY}/trace", "NCCL_DEBUG": "WARN"},
        image=f"image {NASTY}",
    )
    text = render(made, SlurmOptions(file=f"{NASTY}.sbatch", venv=NASTY, mounts=NASTY))
    shown = settings(text, "$RUN_DIR", "$IMAGE", "$VENV", "$MOUNTS", "$SAID", "$TRACE", "${flags[1]}", "${flags[2]}")
    run_dir = f"{tmp_path}/{NASTY}"
    assert shown == [
        run_dir, f"image {NASTY}", NASTY, NASTY, NASTY, f"{run_dir}/trace", f"--dataset={NASTY}", f"--run_dir={run_dir}"
    ]  # fmt: skip
    assert (Path(run_dir) / "submit.sh").is_file()


def test_the_run_directory_is_the_job_s_own(tmp_path: Path) -> None:
    text = render(job(), SlurmOptions())
    assert settings(text, "$RUN_DIR", SLURM_SUBMIT_DIR=str(tmp_path)) == [f"{tmp_path}/runs/demo-12"]
    own = str(tmp_path / "mine")
    assert settings(text, "$RUN_DIR", "${flags[-1]}", RUN_DIR=own) == [own, f"--run_dir={own}"]
    trace = settings(text, "$TORCH_FR_DUMP_TEMP_FILE", RUN_DIR=own)[0]
    assert trace.startswith(f"{own}/"), "what the environment says of the run directory follows RUN_DIR"


def test_every_instance_gets_its_own_environment(tmp_path: Path) -> None:
    """Whatever instance a file is written for, INSTANCE=other gives what a file for the other one gives."""
    text = render(job(), SlurmOptions())
    run_dir = str(tmp_path)
    one_of_each_kind = {row.family: row for row in instances()}.values()
    for row in one_of_each_kind:
        wanted = job(instance=row.name, run_dir=run_dir)
        names = sorted({*wanted.environment, *job().environment, "NCCL_SHM_USE_CUDA_MEMCPY", "FI_EFA_USE_HUGE_PAGE"})
        shown = settings(
            text, "$ranks", *(f"${{{name}-}}" for name in names), INSTANCE=row.name, RUN_DIR=run_dir, SAVE_SECONDS="100"
        )
        assert shown[0] == str(row.num_gpus)
        assert dict(zip(names, shown[1:], strict=True)) == {name: wanted.environment.get(name, "") for name in names}
    for word, name in families().items():
        assert settings(text, "$ranks", INSTANCE=word, RUN_DIR=run_dir) == settings(
            text, "$ranks", INSTANCE=name, RUN_DIR=run_dir
        )


def test_what_is_set_at_submission_wins(tmp_path: Path) -> None:
    text = render(job(extra_environment={"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3"}), SlurmOptions())
    here = {"RUN_DIR": str(tmp_path)}
    assert settings(text, "$NCCL_DEBUG", "$OMP_NUM_THREADS", "$ranks", **here) == ["INFO", "3", "8"]
    given = {**here, "NCCL_DEBUG": "TRACE", "RANKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "4"}
    assert settings(text, "$NCCL_DEBUG", "$ranks", **given) == ["TRACE", "2"]
    assert settings(text, "$ranks", SLURM_GPUS_ON_NODE="4", **here) == ["4"]
    assert settings(text, "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SAVE_SECONDS="77", **here) == ["77"]


@pytest.mark.parametrize(
    ("words", "said"), [(["--run_dir=x"], "set RUN_DIR"), (["--lr=1", "--nproc_per_node", "2"], "RANKS_PER_NODE")]
)
def test_flags_that_are_the_script_s_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", render(job(), SlurmOptions()), "sh", *words],
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "RUN_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert done.returncode == 2
    assert said in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_unknown_instance_is_refused(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "RUN_DIR": str(tmp_path), "INSTANCE": "p9"}
    words = ["bash", "-c", render(job(), SlurmOptions()), __file__]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, "INSTANCE=p9: expected one of the types" in done.stdout) == (2, True)


@pytest.mark.parametrize("image", [None, "/fsx/images/hypershard.sqsh"])
def test_bash_reads_every_file(image: str | None, tmp_path: Path) -> None:
    texts = [render(job(image=image, instance=name), SlurmOptions(mounts="/fsx:/fsx")) for name in (None, "p4d", "g5")]
    paths = [*write_all(tmp_path, available_models())]
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number}.sbatch")
        paths[-1].write_text(text)
    for path in paths:
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
        assert not done.stderr, f"{path.name}: {done.stderr}"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", str(paths[0])], check=True)


def test_no_unfilled_place_is_left() -> None:
    for model in available_models():
        assert "@@" not in file_text(model)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["slurm", "--model=llama3_8b", "--instance=p4d", "--nodes=3", "--partition=gpu", "--environment=A=b=c"]
    words.append("--activation_checkpointing=1")
    assert launch.run([*words, "--dry_run", "--train_batch_size=1", "--lr", "3e-4"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=3\n" in text
    assert "#SBATCH --partition=gpu\n" in text
    assert "    --train_batch_size=1\n    --lr\n    3e-4\n" in text
    assert "default A=b=c\n" in text
    path = tmp_path / "new" / "mine.sbatch"
    assert launch.run([*words, f"--write={path}"]) == 0
    assert re.search(r"^#   sbatch \S*mine.sbatch$", path.read_text(), re.MULTILINE)
    assert launch.run(["slurm", "--write", str(tmp_path / "all")]) == 0
    assert len(list((tmp_path / "all").iterdir())) == len(available_models())
    with pytest.raises(ConfigError, match="--environment A"):
        launch.run(["slurm", "--model=llama3_8b", "--dry_run", "--environment=A"])


def test_without_slurm_the_command_says_what_else_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="--dry_run prints"):
        launch.run(["slurm", "--model=tiny_llama"])
