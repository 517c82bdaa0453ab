"""Variables of a job: none that is obsolete or harmful, none where it does not belong."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from hypershard.catalog.instances import Instance, instance, instances
from hypershard.errors import ConfigError
from hypershard.launch.environment import REASONS, check_extra, environment_for

RUN_DIR = "/fsx/run"
FORBIDDEN = re.compile(
    r"RDMAV_.*|FI_EFA_(USE_DEVICE_RDMA|MTU_SIZE|[TR]X_IOV_LIMIT|SET_CUDA_SYNC_MEMOPS|ENABLE_SHM_TRANSFER|FORK_SAFE)"
    r"|FI_PROVIDER|NCCL_(TIMEOUT|PROTO|ALGO|BUFFSIZE|MIN_NCHANNELS|TUNER_PLUGIN|NVLS_ENABLE|ASYNC_ERROR_HANDLING)"
    r"|PYTORCH_CUDA_ALLOC_CONF|TORCH_NCCL_DEBUG_INFO_TEMP_FILE|LD_PRELOAD|RANK|WORLD_SIZE|MASTER_.*"
)


@pytest.mark.parametrize("row", [None, *instances()], ids=lambda row: row.name if row else "unknown")
def test_every_variable_is_needed_and_has_its_reason(row: Instance | None) -> None:
    environment = environment_for(row, run_dir=RUN_DIR)
    assert environment.keys() <= REASONS.keys()
    for name, value in environment.items():
        assert not FORBIDDEN.fullmatch(name)
        assert value
        assert "\n" not in REASONS[name]
        assert len(REASONS[name]) < 90  # a comment beside it still fits a line
    has_efa = row is not None and row.efa_interfaces > 0
    assert any(name.startswith(("FI_", "OFI_")) for name in environment) == has_efa
    check_extra(environment)  # what a job gets, a user may set otherwise


def test_every_reason_is_of_a_variable_that_some_job_gets() -> None:
    given = {name for row in instances() for name in environment_for(row, run_dir=RUN_DIR)}
    assert given == REASONS.keys()


def test_the_whole_environment_of_three_instances() -> None:
    everywhere = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "NCCL_DEBUG": "WARN",
        "TORCH_FR_DUMP_TEMP_FILE": "/fsx/run/nccl_trace_rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100",
    }
    assert environment_for(None, run_dir=RUN_DIR) == everywhere
    assert environment_for(instance("p5"), run_dir="/fsx/run/") == {
        **everywhere,
        "OMP_NUM_THREADS": "12",  # 96 cores, 8 GPUs
        "FI_EFA_USE_HUGE_PAGE": "0",
    }
    assert environment_for(instance("g5.12xlarge"), run_dir=RUN_DIR) == {
        **everywhere,
        "OMP_NUM_THREADS": "6",
        "FI_EFA_USE_HUGE_PAGE": "0",
        "NCCL_SHM_USE_CUDA_MEMCPY": "1",
    }
    assert environment_for(instance("g6.xlarge"), run_dir=RUN_DIR) == {**everywhere, "OMP_NUM_THREADS": "2"}


def test_copy_engines_where_several_gpus_talk_through_host_memory() -> None:
    with_it = [row.name for row in instances() if "NCCL_SHM_USE_CUDA_MEMCPY" in environment_for(row, run_dir=RUN_DIR)]
    assert with_it == [f"{family}.{size}xlarge" for family in ("g5", "g6") for size in (12, 24, 48)]


def test_ranks_never_ask_for_more_threads_than_there_are_cores() -> None:
    for row in instances():
        num_threads = int(environment_for(row, run_dir=RUN_DIR)["OMP_NUM_THREADS"])
        assert 1 <= num_threads * row.num_gpus <= row.num_vcpus // 2


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT"])
def test_the_installed_torch_knows_the_names(name: str) -> None:
    """torch ignores what it does not know: a renamed variable would go unnoticed until the first hang."""
    root = Path(torch.__file__).parent
    places = [*(root / "lib").glob("lib*.so"), *(root / "include").glob("torch/csrc/distributed/c10d/*.hpp")]
    assert len(places) > 10
    found = subprocess.run(["grep", "-lF", name, *places], capture_output=True, text=True, check=False)
    assert found.stdout


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("FI_EFA_MTU_SIZE", "ends the program"),
        ("FI_EFA_USE_DEVICE_RDMA", "obsolete"),
        ("RDMAV_FORK_SAFE", "breaks EFA"),
        ("NCCL_TIMEOUT", "neither NCCL nor torch"),
        ("RANK", "what starts the ranks sets it"),
        ("LOCAL_WORLD_SIZE", "what starts the ranks sets it"),
        ("MASTER_ADDR", "what starts the ranks sets it"),
        ("SLURM_PROCID", "what starts the ranks sets it"),
        ("HF_TOKEN", "no secret may stand in it"),
        ("AWS_SECRET_ACCESS_KEY", "no secret"),
        ("AWS_ACCESS_KEY_ID", "no secret"),
        ("AWS_SESSION_TOKEN", "no secret"),
        ("WANDB_API_KEY", "no secret"),
        ("my_password", "no secret"),
    ],
)
def test_what_a_user_may_not_add_is_refused_without_its_value(name: str, part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"environment variable {name}: ")) as caught:
        check_extra({"FINE": "1", name: "hunter2"})
    assert part in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_what_a_user_may_add() -> None:
    check_extra(
        {
            "NCCL_DEBUG": "INFO",
            "NCCL_SOCKET_IFNAME": "en",
            "FI_PROVIDER": "efa",
            "TOKENIZERS_PARALLELISM": "0",
            "HF_TOKEN_PATH": "/fsx/token",
            "AWS_SHARED_CREDENTIALS_FILE": "/fsx/aws",
            "SSH_KEYFILE": "/fsx/key",
        }
    )
