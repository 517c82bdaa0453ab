"""Where a node is: SageMaker's files, Kubernetes' and Slurm's variables; hyperparameters and channels to flags."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from hypershard.config.schema import SETTINGS
from hypershard.errors import ConfigError
from hypershard.launch.sagemaker_environment import SPELLINGS, channel_flags, flags_of
from hypershard.launch.surroundings import NodePlace, Platform, find_place


def sagemaker(ml: Path, **resources: Any) -> Path:
    config = ml / "input/config"
    config.mkdir(parents=True, exist_ok=True)
    (config / "resourceconfig.json").write_text(json.dumps(resources))
    return ml


def test_a_host_of_sagemaker_is_numbered_by_its_name(tmp_path: Path) -> None:
    hosts = [f"algo-{number}" for number in (1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)]  # sorted as texts, as SageMaker does
    ml = sagemaker(tmp_path, current_host="algo-10", hosts=hosts, network_interface_name="eth0")
    place = find_place({"TRAINING_JOB_NAME": "llama-1"}, ml=ml)
    assert (place.node_rank, place.num_nodes, place.main_host) == (9, 11, "algo-1")
    assert (place.platform, place.interface, place.job) == (Platform.SAGEMAKER, "eth0", "llama-1")
    assert place.failure_file == tmp_path / "output/failure" and place.clean_stop_code == 0


def test_half_a_sagemaker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="current_host is 'algo-3', expected one of hosts"):
        find_place({}, ml=sagemaker(tmp_path, current_host="algo-3", hosts=["algo-1"]))
    (tmp_path / "input/config/resourceconfig.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        find_place({}, ml=tmp_path)


def test_a_pod_finds_its_index_and_the_service(tmp_path: Path) -> None:
    variables = {"JOB_COMPLETION_INDEX": "3", "HYPERSHARD_NUM_NODES": "4", "HYPERSHARD_MAIN_HOST": "job-0.job"}
    place = find_place(variables, ml=tmp_path)
    assert (place.node_rank, place.num_nodes, place.main_host, place.job) == (3, 4, "job-0.job", "job-0")
    assert place.host == f"{socket.gethostname()}.job" and place.clean_stop_code == 143
    with pytest.raises(ConfigError, match="HYPERSHARD_MAIN_HOST is not set"):
        find_place(variables | {"HYPERSHARD_MAIN_HOST": ""}, ml=tmp_path)
    with pytest.raises(ConfigError, match="HYPERSHARD_NUM_NODES: found '', expected a number"):
        find_place({"JOB_COMPLETION_INDEX": "0"}, ml=tmp_path)


SLURM = {
    "SLURM_STEP_NODELIST": "p5-[007-008]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "41",
    "SLURMD_NODENAME": "p5-008",
}


def test_a_step_of_slurm_has_one_task_per_node(tmp_path: Path) -> None:
    place = find_place(SLURM, ml=tmp_path)
    assert (place.node_rank, place.num_nodes, place.main_host, place.host) == (1, 2, "p5-007", "p5-008")
    again = find_place(SLURM | {"SLURM_RESTART_COUNT": "1"}, ml=tmp_path)
    assert again.job != place.job and place.clean_stop_code == 143
    with pytest.raises(ConfigError, match="ntasks-per-node=1"):
        find_place(SLURM | {"SLURM_STEP_NUM_TASKS": "16"}, ml=tmp_path)


def test_elsewhere_a_machine_is_alone(tmp_path: Path) -> None:
    assert find_place({"SLURM_JOB_ID": "41", "HOSTNAME": "login"}, ml=tmp_path) == NodePlace()


def test_hyperparameters_come_raw_encoded_and_in_their_own_spelling() -> None:
    raw = {"MODEL_ID": "/models/a", "LEARNING_RATE": "2e-4", "MAX_LENGTH": "3072", "PER_DEVICE_BATCH_SIZE": "1"}
    flags = ["--init_from=/models/a", "--lr=2e-4", "--max_context_width=3072", "--train_batch_size=1"]
    assert flags_of(raw) == flags
    assert flags_of({name: json.dumps(value) for name, value in raw.items()}) == flags
    assert flags_of({"model": "tiny_llama", "bf16": True, "max_steps": 5, "max_restarts": "2"}) == [
        "--model=tiny_llama",
        "--bf16=true",
        "--max_steps=5",
        "--max_restarts=2",
    ]
    assert flags_of({"sagemaker_region": '"us-west-2"', "train_flags": '["--lr", "1e-4"]'}) == ["--lr", "1e-4"]


def test_a_hyperparameter_that_cannot_act_is_refused_without_its_value() -> None:
    with pytest.raises(ConfigError, match=r"hyperparameter hidden_size is unknown") as unknown:
        flags_of({"hidden_size": "hf_secretsecretsecret"})
    assert "hf_secret" not in str(unknown.value)
    with pytest.raises(ConfigError, match="--lr is given twice"):
        flags_of({"lr": "1e-4", "LEARNING_RATE": "1e-4"})
    with pytest.raises(ConfigError, match="expected a JSON list of texts"):
        flags_of({"train_flags": "--lr 1e-4"})


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_acts_or_says_that_this_version_cannot(spelling: str) -> None:
    flag = SPELLINGS[spelling]
    if flag in SETTINGS:
        assert flags_of({spelling: "1"}) == [f"--{flag}=1"]
    else:
        with pytest.raises(ConfigError, match=f"stands for --{flag}, which this version does not have"):
            flags_of({spelling: "1"})


def test_channels_name_folders(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/run.yaml").write_text("max_steps: 3\n")
    channels = {"training": {"TrainingInputMode": "FastFile"}, "config": {}, "extra": None, "tokenizer": {}}
    assert channel_flags(channels, data=tmp_path) == [
        f"--config={tmp_path}/config/run.yaml",
        f"--tokenizer={tmp_path}/tokenizer",
        f"--dataset={tmp_path}/training",
    ]
    with pytest.raises(ConfigError, match="another channel is --dataset already"):
        channel_flags({"train": {}, "training": {}}, data=tmp_path)
    with pytest.raises(ConfigError, match="found input mode Pipe, expected FastFile or File"):
        channel_flags({"train": {"TrainingInputMode": "Pipe"}}, data=tmp_path)
    (tmp_path / "config/other.yml").write_text("")
    with pytest.raises(ConfigError, match=r"expected one YAML file in .*, found other.yml, run.yaml"):
        channel_flags(channels, data=tmp_path)
