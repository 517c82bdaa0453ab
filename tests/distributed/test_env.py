import os

import pytest

from hypershard.distributed.env import Ranks, Surroundings, first_host, read_ranks, read_surroundings
from hypershard.errors import ConfigError


def test_alone() -> None:
    assert read_ranks({}) == Ranks()
    # A batch script has SLURM_PROCID but is no step: it is a person's shell.
    assert read_ranks({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) == Ranks()


def test_torchrun_wins_over_srun() -> None:
    environment = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
        "MASTER_PORT": "29",
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "9",
    }  # fmt: skip
    assert read_ranks(environment) == Ranks(3, 4, 1, 2, "h", 29, "torchrun")


def test_srun() -> None:
    environment = {
        "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NODELIST": "p5-[007,009-010]", "SLURM_JOB_ID": "123",
    }  # fmt: skip
    ranks = read_ranks(environment)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (5, 16, 5, 8)
    assert ranks.master_addr == "p5-007"
    assert 20000 <= ranks.master_port < 32768  # below the ephemeral ports
    assert ranks.master_port != read_ranks(environment | {"SLURM_STEP_ID": "3"}).master_port


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("a1", "a1"),
        ("a1,a2", "a1"),
        ("p5-[007-010,12],x1", "p5-007"),
        ("n[1,3]-ib", "n1-ib"),
        ("ip-10-0-0-[4-9]", "ip-10-0-0-4"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_surroundings() -> None:
    ranks = Ranks(launcher="srun", master_addr="p5-001")
    environment = {
        "SLURM_TOPOLOGY_ADDR": "core.leaf3.p5-007",
        "SLURM_JOB_END_TIME": "1700000000",
        "GLOO_SOCKET_IFNAME": "ens32",
    }
    found = read_surroundings(ranks, environment)
    assert found == Surroundings("p5-001", "ens32", "core.leaf3", os.getppid(), 1.7e9)
    assert read_surroundings(Ranks(), {}) == Surroundings(launcher_pid=os.getpid())


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK"):
        read_ranks({"RANK": "0", "WORLD_SIZE": "2"})
