"""The cause in the output of many ranks, and no secret in it."""

from pathlib import Path

import pytest

from hypershard.launch.failure import LIMIT_CHARACTERS, Said, last_error, redact, shortened, write_failure

OUTPUT = """\
16:31:20 I run directory /fsx/runs/one
step 70/100000  loss 8.2964  norm 1.06
16:31:41 E rank 3 Traceback (most recent call last):
  File "hypershard/cli/train.py", line 139, in _train
RuntimeError: CUDA error: an illegal memory access was encountered
16:31:42 W rank 1 another rank left the job; its own log says why
16:31:42 E rank 2 something that followed from it
E1121 16:31:43.7 2023 torch/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 3 (pid: 2610)
Traceback (most recent call last):
  File "/venv/lib/python3.12/site-packages/torch/distributed/run.py", line 1028, in main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
  exitcode  : 1 (pid: 2610)""".splitlines()


def test_the_first_rank_that_failed_tells_the_cause() -> None:
    error = last_error(OUTPUT)
    assert error.startswith("Traceback") and error.endswith("an illegal memory access was encountered")


def test_without_a_line_of_ours_a_traceback_that_is_not_torchruns() -> None:
    crash = ["Traceback (most recent call last):", "  File x", "ImportError: libcudart.so.13"]
    assert last_error(crash + OUTPUT[7:]) == "\n".join(crash)
    assert last_error(OUTPUT[7:]) == ""


def test_the_exit_code_is_that_of_the_rank_which_began() -> None:
    said = Said()
    assert said.cause_code is None
    for line in ("failed (exitcode: -15) local_rank: 1 (pid: 4)", "  exitcode  : 1 (pid: 5)"):
        said.add(line)
    assert said.cause_code == 1 and not said.is_final
    said.add("  exitcode  : 2 (pid: 6)")
    assert said.cause_code == 2 and said.is_final
    said.forget()
    assert said.cause_code is None and not said.lines


@pytest.mark.parametrize(
    "text",
    [
        "key AKIAABCDEFGHIJKLMNOP was refused",
        "HF_TOKEN=hf_abcdefghijklmnopqrstuvwx",
        "GET https://b.s3.amazonaws.com/k?X-Amz-Signature=abcdefgh1234&X-Amz-Security-Token=abcdefgh1234",
        "https://user:abcdefgh1234@proxy:3128/",
        "'Authorization': 'Bearer abcdefgh1234'",
        "aws_secret_access_key = abcdefgh1234",
        "WANDB_API_KEY: abcdefgh1234",
        "what the environment calls a password, abcdefgh1234, said in any place",
    ],
)
def test_secrets_are_taken_out(text: str) -> None:
    found = redact(text, {"DB_PASSWORD": "abcdefgh1234", "HOME": "/root"})
    assert "[redacted]" in found
    assert not any(secret in found for secret in ("abcdefgh1234", "AKIAABCDEFGH", "hf_abcdef"))


def test_what_is_no_secret_stays() -> None:
    text = (
        "--global_batch_tokens: found 5, expected a multiple of 64 tokens; tokenizer=/data/tokenizer, key_value_heads=8"
    )
    assert redact(text, {"MAX_TOKENS": "64", "HOME": "/root"}) == text


def test_a_long_error_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    text = "algo-1: exit code 1\n" + "x" * 5000 + "\nValueError: the reason"
    short = shortened(text)
    assert len(short) == LIMIT_CHARACTERS and short.startswith("algo-1: exit code 1") and short.endswith("the reason")
    write_failure(tmp_path / "output/failure", text + " HF_TOKEN=hf_abcdefghijklmnopqrstuvwx")
    written = (tmp_path / "output/failure").read_text()
    assert len(written) == LIMIT_CHARACTERS and written.endswith("[redacted]")
