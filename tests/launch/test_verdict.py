"""What a job does next, for every way a launch can end."""

import json
from pathlib import Path
from typing import Any

import pytest

from hypershard.cli import launch
from hypershard.errors import ConfigError
from hypershard.launch.verdict import IllNode, Nodes, Record, judge, read_events, summarise, unwell

JOB = "7"
WELL = Nodes()


def launched(job: str = JOB) -> dict[str, Any]:
    return {"event": "launched", "job": job}


def started(step: int) -> dict[str, Any]:
    return {"event": "started", "step": step}


def saved(step: int) -> dict[str, Any]:
    return {"event": "saved", "step": step, "tiers": ["disk"]}


def stopped(step: int, reason: str) -> dict[str, Any]:
    return {"event": "stopped", "step": step, "reason": reason}


def failed(error: str) -> dict[str, Any]:
    return {"event": "failed", "error": error}


def action(
    *events: dict[str, Any], exit_code: int | None = 1, told: str | None = None, nodes: Nodes = WELL, restarts: int = 3
) -> str:
    record = summarise(events, job=JOB)
    return judge(record, exit_code=exit_code, told=told, max_restarts=restarts, nodes=nodes).action


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([started(0), stopped(9, "steps")], "done"),
        ([started(0), saved(4), stopped(9, "hours")], "done"),
        ([started(0), stopped(9, "SIGTERM")], "requeue"),
        ([started(0), stopped(9, "SIGUSR1")], "requeue"),
        ([started(0), stopped(9, "another rank's signal")], "requeue"),
        ([started(0), stopped(9, "time limit")], "requeue"),
        ([started(0), stopped(9, "SIGINT")], "stopped"),
        ([started(0), saved(4)], "start"),
        ([started(0), failed("RuntimeError: NCCL")], "start"),
        ([failed("StorageError: no space left")], "start"),
        ([failed("DataError: nothing there")], "give_up"),
        ([failed("ConfigError: no such flag")], "give_up"),
        ([failed("DamagedCheckpoint: other bytes")], "give_up"),
        ([started(0), saved(4), failed("TrainingDiverged: the loss is nan")], "give_up"),
        ([], "start"),
    ],
)
def test_the_record_decides(events: list[dict[str, Any]], expected: str) -> None:
    assert action(launched(), *events) == expected
    assert action(launched(), *events, exit_code=143) == expected


def test_exit_code_zero_without_an_end_is_an_evaluation() -> None:
    assert action(launched(), started(9), exit_code=0) == "done"
    assert action(launched(), started(0), stopped(5, "time limit"), exit_code=0) == "requeue"


def test_what_an_earlier_launch_wrote_does_not_count() -> None:
    assert action(launched(), started(0), stopped(9, "SIGTERM"), launched(), started(9)) == "start"
    assert action(launched(), failed("DataError: gone"), launched()) == "start"


def test_a_user_s_stop_is_never_undone() -> None:
    assert action(launched(), started(0), stopped(3, "SIGTERM"), told="cancel") == "stopped"
    assert action(launched(), started(0), told="cancel") == "stopped"
    assert action(told="cancel", exit_code=None) == "stopped"
    assert action(launched(), started(0), stopped(9, "steps"), told="cancel") == "done"


def test_the_end_of_the_time_requeues_whatever_the_ranks_did() -> None:
    assert action(launched(), started(0), stopped(3, "SIGTERM"), told="time_limit") == "requeue"
    assert action(launched(), told="time_limit") == "requeue", "stopped while it was starting"
    assert action(told="time_limit", exit_code=None) == "requeue"
    assert action(launched(), failed("DataError: gone"), told="time_limit") == "give_up"


def test_launches_without_progress_are_counted() -> None:
    crash = [launched(), started(0)]
    assert action(*crash, *crash) == "start"
    assert action(*crash, *crash, *crash) == "give_up"
    assert action(*crash, *crash, *crash, exit_code=None) == "give_up", "also before the first start after a requeue"
    assert action(*crash, *crash, *crash, told="time_limit") == "give_up"
    assert action(*crash, *crash, *crash, saved(4)) == "start"
    assert action(*crash, *crash, saved(4), launched(), started(4), launched(), started(4)) == "start"
    later = [launched(), started(4)] * 3
    assert action(*crash, saved(4), *later) == "give_up"
    assert action(*crash, restarts=0) == "give_up"
    assert action(exit_code=None, restarts=0) == "start"


def test_a_step_that_was_reached_before_is_no_progress() -> None:
    """A node's loss takes its memory checkpoints along: the same step is saved again and again."""
    again = [launched(), started(0), saved(10)]
    assert summarise(again * 3, job=JOB).stuck_launches == 2
    assert action(*again * 4) == "give_up"


def test_preemptions_do_not_count() -> None:
    preempted = [launched(), {"event": "preempted"}]
    assert action(*preempted * 9, told="preemption") == "requeue", "even while it was starting"
    assert action(*preempted * 9, exit_code=None) == "start"
    assert action(launched(), started(0), launched(), started(0), *preempted, launched()) == "give_up"
    assert action(launched(), started(0), stopped(9, "steps"), {"event": "preempted"}, told="preemption") == "done"


def test_another_job_counts_anew() -> None:
    """Whoever mended the fault and submits again must not be refused for the past."""
    crash = [launched("6"), started(0), failed("RuntimeError: once")]
    assert action(*crash * 3, exit_code=None) == "start"
    assert action(*crash * 3, launched(), started(0)) == "start"
    assert summarise(crash * 3 + [launched()], job=JOB).last_error is None
    assert summarise(crash * 3, job=None).stuck_launches == 3


def test_the_last_error_is_quoted_in_one_short_line() -> None:
    record = summarise([launched(), failed("RuntimeError: one\n two" + "x" * 1000)] * 3, job=JOB)
    verdict = judge(record, exit_code=1, told=None, max_restarts=3, nodes=WELL)
    assert "3 launches without a newer step than 0; last error: RuntimeError: one two" in verdict.reason
    assert len(verdict.line()) < 500
    assert "\n" not in verdict.line()


def test_slurm_s_states() -> None:
    states = "a idle\na idle\nb down*\nc drained\nd draining@\ne fail\nf mixed\ng allocated+drain\nh failing"
    nodes = unwell(states)
    assert [node.name for node in nodes.ill] == ["b", "e", "h"]
    assert nodes.leaving == ("c", "d", "g")
    assert unwell("") == WELL


def test_ill_nodes_are_replaced_only_with_evidence() -> None:
    crash = [launched(), started(0)]
    ill = unwell("a allocated\nb fail")
    assert action(*crash, nodes=ill) == "replace"
    assert action(*crash, nodes=unwell("a draining")) == "requeue"
    assert action(*crash, nodes=unwell("a allocated")) == "start"
    assert action(launched(), started(0), stopped(5, "SIGTERM"), nodes=ill) == "requeue"
    verdict = judge(summarise(crash, job=JOB), exit_code=1, told=None, max_restarts=3, nodes=ill)
    assert verdict.line().startswith("replace b=Replace b: Slurm says fail; exit code 1")


def test_a_health_check_is_evidence() -> None:
    lines = [
        {"host": "a", "verdict": "ok", "reason": "well"},
        {"host": "b", "verdict": "replace", "reason": "GPU 3: ECC\nerrors"},
        {"host": "c", "verdict": "reboot", "reason": "GPU 1 fell off the bus"},
        {"host": "elsewhere", "verdict": "replace", "reason": "not ours"},
        {"host": "a; rm", "verdict": "replace", "reason": "no host"},
    ]
    health = "noise\n" + "\n".join(json.dumps(line) for line in lines) + '\n{"host": "cut'
    found = unwell("a idle\nb idle\nc idle", health, among=["a", "b", "c"])
    assert found.ill == (
        IllNode("b", "Replace", "health check: GPU 3: ECC errors"),
        IllNode("c", "Reboot", "health check: GPU 1 fell off the bus"),
    )
    assert [node.name for node in unwell("", health).ill] == ["b", "c", "elsewhere"]


def test_a_damaged_record_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == []
    whole = [json.dumps(event) for event in (launched(), started(3))]
    path.write_bytes("\n".join([whole[0], '{"event": "sav', "[1]", whole[1], "\xff{"]).encode("latin-1"))
    assert read_events(path) == [launched(), started(3)]


def test_the_command_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [launched(), started(0), saved(8)]
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    health = tmp_path / "health.jsonl"
    health.write_text(json.dumps({"host": "n2", "verdict": "replace", "reason": "Xid 79"}))
    words = ["verdict", str(tmp_path), "--job=7", "--exit_code=1", "--node_states=n1 allocated\nn2 allocated"]
    assert launch.run(words) == 0
    assert capsys.readouterr().out.startswith("start - again, after exit code 1, no error on record")
    assert launch.run([*words, f"--health={health}"]) == 0
    assert capsys.readouterr().out.startswith("replace n2=Replace n2: health check: Xid 79;")
    assert launch.run([*words, "--told=cancel"]) == 0
    assert capsys.readouterr().out == "stopped - asked to stop; newest step 8\n"


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        launch.run(["verdict", str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="--health"):
        launch.run(["verdict", str(tmp_path), f"--health={tmp_path}/none"])


def test_nothing_known_starts() -> None:
    assert judge(Record(), exit_code=None, told=None, max_restarts=3, nodes=WELL).action == "start"
