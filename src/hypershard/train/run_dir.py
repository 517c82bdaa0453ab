"""The run directory, the interface between this program and everything that reads a run.

config.yaml        the whole resolved configuration; `hypershard train --config` starts the same run
code.txt           commit and uncommitted changes of the code that ran
environment.json   versions, hosts and devices
metrics.jsonl      one line per logged step, and one per validation
texts.jsonl        what the model wrote at each validation, with --validation_texts
plan.json          what was planned: memory, seconds, dollars; as `hypershard plan --json`
actual.json        what it really took, beside the plan, once the run has ended
events.jsonl       started, saved, stopped, failed, alarm: with the time; job scripts add launched and preempted
tensorboard/       the same numbers for TensorBoard
tokenizer/         the tokenizer, so that a run can be read without its data
checkpoints/       step-XXXXXXXX/ with a MANIFEST.json written last
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint.hf_folder import TOKENIZER_FILES
from ..config.schema import Config, ReportConfig
from ..config.sources import to_yaml
from ..distributed.env import Ranks
from ..errors import ConfigError
from ..log import logger
from ..metrics.display import Display
from ..metrics.sinks import JsonLines, Sink, TensorBoard, drop_after
from ..storage import local_path, make_directory, write_bytes, write_json
from ..units import quoted

if TYPE_CHECKING:
    from .texts import WrittenText

METRICS, TEXTS, EVENTS = "metrics.jsonl", "texts.jsonl", "events.jsonl"
_PROMPT_SHOWN, _TEXT_SHOWN = 50, 80  # characters of a prompt's end and a text's beginning: two lines of a terminal


def choose_run_dir(report: ReportConfig, *, model_name: str) -> Path:
    """--run_dir, or a new dated folder under runs/."""
    if report.run_dir is not None:
        return local_path(report.run_dir, flag="--run_dir").absolute()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs").absolute() / f"{stamp}-{report.run_name or model_name}"


def refuse_second_start(run_dir: Path, checkpoint_dir: Path) -> None:
    """A run that is not resumed must not write over another. Raises ConfigError saying what is there."""
    if (run_dir / METRICS).exists() or any(checkpoint_dir.glob("step-*")):
        raise ConfigError(
            f"--run_dir={run_dir} already holds a run; add --resume_from_checkpoint to go on with it, "
            f"or name another --run_dir"
        )


def is_only_read(run_dir: Path, config: Config) -> bool:
    """Whether this is somebody's run that is just being evaluated, so that its own description stays."""
    return config.train.eval_only and (run_dir / "config.yaml").exists()


def write_description(run_dir: Path, config: Config, ranks: Ranks, *, device_name: str) -> None:
    """Write config.yaml, code.txt and environment.json; a run that is only evaluated keeps its own."""
    if is_only_read(run_dir, config):
        return
    make_directory(run_dir)
    write_bytes(run_dir / "config.yaml", to_yaml(config).encode())
    write_bytes(run_dir / "code.txt", _code_state().encode())
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    environment = {
        "hypershard": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "host": platform.node(),
        "device": device_name,
        "num_cpus": len(os.sched_getaffinity(0)),
        "world_size": ranks.world_size,
        "local_world_size": ranks.local_world_size,
        "launcher": ranks.launcher,
    }
    write_json(run_dir / "environment.json", environment)


def belongings(config: Config, tokenizer_path: Path | None) -> dict[str, bytes]:
    """What a run needs besides tensors to go on elsewhere, by file name: its configuration, its tokenizer and how that
    writes conversations."""
    files = {"config.yaml": to_yaml(config).encode()}
    if tokenizer_path is not None:
        files["tokenizer/tokenizer.json"] = tokenizer_path.read_bytes()
        for name in TOKENIZER_FILES[1:]:
            if (source := tokenizer_path.parent / name).is_file():
                files[f"tokenizer/{name}"] = source.read_bytes()
    if config.data.chat_template is not None:  # it goes before the tokenizer's own, for conversations with tools too
        files["tokenizer/chat_template.jinja"] = Path(config.data.chat_template).expanduser().read_bytes()
        files.pop("tokenizer/additional_chat_templates/tool_use.jinja", None)
    return files


def keep(run_dir: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` into the run directory."""
    for name, content in files.items():
        path = run_dir / name
        make_directory(path.parent)
        write_bytes(path, content)


def _code_state() -> str:
    """Commit and diff of the source tree, or the installed version where there is no repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", "-C", str(here), *arguments), capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return f"hypershard {__version__}, not run from a repository with a commit\n"
    return f"commit {commit}{git('diff', 'HEAD', '--', str(here)) or ''}"


def sinks_opener(
    run_dir: Path, config: Config, *, is_main: bool, more: Sequence[Sink]
) -> Callable[[int, int], Sequence[Sink]]:
    """A function that opens this rank's sinks (none but on rank 0) with `more`, for the steps after one to the last.

    Records of later steps are dropped, because those steps are done again; not so by `eval_only`, which does none.
    """
    report, eval_only = config.report, config.train.eval_only

    def open_sinks(step: int, last_step: int) -> Sequence[Sink]:
        if not is_main:
            return ()
        if not eval_only:
            drop_after(run_dir / METRICS, step)
            drop_after(run_dir / TEXTS, step)
        sinks: list[Sink] = [JsonLines(run_dir / METRICS), Display(last_step=last_step, first_step=step)]
        if report.tensorboard_dir != "none":
            directory = report.tensorboard_dir or str(run_dir / "tensorboard")
            sinks.append(
                TensorBoard(local_path(directory, flag="--tensorboard_dir"), purge_after=None if eval_only else step)
            )
        return [*sinks, *more]

    return open_sinks


def text_keeper(run_dir: Path) -> Callable[[int, Sequence[WrittenText]], None]:
    """A function `keep_texts(step, texts)` that appends to texts.jsonl and shows the first; without texts, nothing."""

    def keep_texts(step: int, texts: Sequence[WrittenText]) -> None:
        if not texts:
            return
        lines = JsonLines(run_dir / TEXTS)
        for text in texts:
            lines.write(step, dataclasses.asdict(text))
        lines.close()
        prompt = quoted(texts[0].prompt, most=_PROMPT_SHOWN, at_start=True)
        logger.info(f"step {step}: the model goes on from {prompt} with {quoted(texts[0].text, most=_TEXT_SHOWN)}")

    return keep_texts


def event_writer(run_dir: Path, *, is_main: bool) -> Callable[..., None]:
    """A function `event(kind, **facts)` that appends to events.jsonl on rank 0, with the time in seconds since 1970."""

    def event(kind: str, **facts: Any) -> None:
        if not is_main:
            return
        lines = JsonLines(run_dir / EVENTS)
        lines.append({"event": kind, "at": time.time(), **facts})
        lines.close()

    return event
