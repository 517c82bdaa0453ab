"""Start a SageMaker training job: `python launchers/sagemaker.py --model llama3_8b --instance p5 …`.

That is `hypershard launch sagemaker`. For Python, from the repository's root, there is one function per instance family
of the catalog, with underscores for hyphens (`p6_b200`). It fills in instance type, GPUs and environment:

    from launchers import sagemaker

    submission = sagemaker.p5(
        model="llama3_8b", flags=["--train_batch_size=2"], nodes=4, hours=24, image=…, role=…, output="s3://bucket/runs"
    )
    submit(connect(None), submission)  # of hypershard.launch.sagemaker_jobs
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypershard.catalog.instances import families
from hypershard.cli.main import main
from hypershard.launch.build import build_job
from hypershard.launch.sagemaker import RUN_DIR, SYNCED_RUN_DIR, Options, Submission, create_training_job_request


def training_job(
    *,
    instance: str,
    model: str | None = None,
    flags: Sequence[str] = (),
    nodes: int,
    hours: float,
    image: str,
    name: str | None = None,
    max_restarts: int = 0,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Submission:
    """The request of a job on `nodes` machines. `flags`: of `hypershard train`; `options`: fields of Options. `model`
    None: that of the run file in `flags`, as in `--config=recipes/llama4_scout_chat_qlora.yaml`.

    Raises ConfigError for what SageMaker would refuse.
    """
    job = build_job(
        train_flags=flags,
        model_name=model,
        instance=instance,
        num_nodes=nodes,
        run_dir=SYNCED_RUN_DIR if options.get("sync_run_dir") else RUN_DIR,
        hours=hours,
        image=image,
        max_restarts=max_restarts,
        name=name,
        extra_environment=environment or {},
        channels=options.get("channels", {}),
    )
    return create_training_job_request(job, Options(**options))


def __getattr__(name: str) -> Callable[..., Submission]:
    """`p5`, `p6_b200`, …: `training_job` on the family's largest type."""
    family = name.replace("_", "-")
    if family not in families():
        raise AttributeError(f"{name}: no instance family of the catalog; there are {', '.join(__dir__())}")
    return functools.partial(training_job, instance=family)


def __dir__() -> list[str]:
    return [family.replace("-", "_") for family in families()]


if __name__ == "__main__":
    sys.exit(main(["launch", "sagemaker", *sys.argv[1:]]))
