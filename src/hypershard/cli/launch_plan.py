"""What the launchers ask the planner: whether a job fits, and how long it takes at most."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError, HypershardError
from ..log import logger
from ..plan.estimate import Plan, why_not


def planned(model: str | None, instance: str | None, *, num_nodes: int, train_flags: Sequence[str]) -> Plan | None:
    """The plan of a job about to be started; None, with the reason logged, where none can be made.

    Raises ConfigError for a job that does not fit, saying what would make it fit; with --force that is only logged.
    """
    from .plan import plan_of

    if instance is None:
        return None
    words = [f"--model={model}"] if model else []
    try:
        made = plan_of([*words, f"--instance={instance}", f"--nodes={num_nodes}", *train_flags])
    except HypershardError as error:  # also a bucket that holds the run file and does not answer here
        logger.info(f"whether it fits was not checked, because no plan could be made ({error})")
        return None
    if made.memory.verdict != "does not fit":
        return made
    if not made.job.train.force:
        raise ConfigError(f"{why_not(made)}. To start it all the same: --force")
    logger.warning(f"{why_not(made)}. Started all the same (--force)")
    return made
