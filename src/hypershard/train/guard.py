"""What to do about a loss or gradient that is not a number."""

from __future__ import annotations

from ..errors import TrainingDiverged
from ..log import logger
from .state import Progress, StepReport


def check(report: StepReport, progress: Progress, *, max_skipped_steps: int) -> None:
    """Warn about a skipped step; raise TrainingDiverged when too many came in a row.

    `progress` is the state after the step. Every rank decides alike: the numbers were summed over all ranks.
    """
    if not report.skipped:
        return
    found = f"loss {report.loss}, gradient norm {report.grad_norm}"
    if progress.skipped_in_row > max_skipped_steps:
        raise TrainingDiverged(
            f"step {progress.step}: {found}; {progress.skipped_in_row} steps in a row were skipped "
            f"(--max_skipped_steps={max_skipped_steps}). The weights are those of the last finite step. "
            f"Lower --lr, lengthen --warmup, or look at the samples at positions "
            f"{progress.samples - report.samples} to {progress.samples - 1}"
        )
    logger.warning(f"step {progress.step}: {found}; the weights were left as they are")
