"""One log format; every line says which rank wrote it, and only rank 0 writes what is not a warning."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("hypershard")


def setup_logging(*, rank: int = 0) -> None:
    """Send this process's log to standard error: rank 0 from INFO on, the others from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    where = "" if rank == 0 else f" rank {rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s{where} %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
