"""What the launchers ask the planner: whether a job fits, how long it takes, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, HypershardError
from ..log import logger
from ..plan.estimate import Plan, why_not
from ..units import format_bytes


def planned(
    model: str | None,
    instance: str | None,
    *,
    num_nodes: int,
    train_flags: Sequence[str],
    service: str | None = None,
    prices_file: Path | None = None,
) -> Plan | None:
    """The plan of a job about to be started, logged in a line; None, with the reason logged, where none can be made.

    With a `service` ("ec2", "sagemaker") it has dollars, at its price or that of `prices_file`. Raises ConfigError for
    settings that do not go with this number of GPUs, and for a job that does not fit, saying what would make it fit;
    with --force the latter is only logged.
    """
    from .plan import plan_of_question, question_of

    if instance is None:
        return None
    words = [f"--instance={instance}", f"--nodes={num_nodes}"]
    words += [f"--model={model}"] if model else []
    words += [f"--service={service}"] if service else []
    words += [f"--prices_file={prices_file}"] if prices_file else []
    try:
        question = question_of([*words, *train_flags], wants_price=service is not None)
    except HypershardError as error:  # also a bucket that holds the run file and does not answer here
        logger.info(f"whether it fits was not checked, because no plan could be made ({error})")
        return None
    made = plan_of_question(question)
    if made.memory.verdict != "does not fit":
        say = logger.info if made.memory.verdict == "fits" else logger.warning
        say(_in_a_line(made))
        return made
    if not made.job.train.force:
        raise ConfigError(f"{why_not(made)}. To start it all the same: --force")
    logger.warning(f"{why_not(made)}. Started all the same (--force)")
    return made


def _in_a_line(made: Plan) -> str:
    """Memory with its verdict, then hours and dollars where they are known."""
    gpu = made.memory.gpu
    parts = [
        f"plan: {made.memory.verdict}, {format_bytes(gpu.needed_bytes)} of a GPU's {format_bytes(gpu.usable_bytes)}"
    ]
    if made.hours is not None and made.step is not None:
        parts.append(f"{made.num_steps:,} steps in {made.hours:,.3g} h (+-{made.step.band:.0%})")
    if made.cost.formula is not None:
        parts.append(made.cost.formula)
    return "; ".join(parts)
