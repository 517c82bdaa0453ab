"""From the data section to this rank's batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config.schema import Config, DataConfig
from ..data.feed import Feed, encoded_cursors, merged_cursors
from ..data.loader import Loader, Share, validation_batches
from ..data.open import Dataset, Text, open_dataset, with_tokenizer_of_model
from ..data.packing import Batch
from ..data.sequences import packing_of, training_sources, validation_sources
from ..data.stream import StreamSpec
from ..distributed.collectives import barrier, gather_objects
from ..distributed.env import Ranks
from ..distributed.process_group import World
from ..errors import ConfigError
from ..log import logger
from .init_from import Origin
from .refuse import refuse_unequal_ranks

_DEFAULTS = DataConfig()
_MOST_WORKERS = 4  # of one rank; a worker tokenises some hundred thousand tokens a second, a GPU trains on fewer


@dataclass(frozen=True)
class TrainingData:
    """A rank's batches, and what a checkpoint keeps of where they are.

    `identity` is what must not change for positions and cursors to mean the same; `samples_per_epoch` is None where a
    stream's length is not known.
    """

    loader: Loader
    feed: Feed
    validation: Callable[[], Iterator[Batch]]
    samples_per_epoch: int | None
    identity: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """For a checkpoint. Collective where there are streams, whose lanes' cursors are on different ranks."""
        cursors = None
        if self.feed.is_stream:
            cursors = encoded_cursors(merged_cursors(gather_objects(self.feed.cursors)))
        return {"data": dict(self.identity), "num_lanes": self.feed.num_lanes, "cursors": cursors}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on where a checkpoint's facts say."""
        self.loader.restore(facts["num_lanes"], cursors=facts["cursors"])


def open_data(config: Config, world: World, origin: Origin | None) -> Dataset:
    """Open the data set, on each node in one rank first: it lists, tokenises and caches while the others wait.

    Text is read with the tokenizer of the weights that training starts from (`origin`), unless another is named.

    DataError, StorageError: as `open_dataset` raises them; a rank that leaves with one ends the wait of the others.
    ConfigError: the ranks differ in flags or files.
    """
    data = config.data_read
    if origin is not None and origin.tokenizer is not None:
        data = with_tokenizer_of_model(data, origin.tokenizer)
        if data.tokenizer != config.data.tokenizer:
            logger.info(f"no --tokenizer given: that of --init_from={config.train.init_from} is used")
    dataset = open_dataset(data) if world.ranks.local_rank == 0 else None
    barrier()
    if dataset is None:
        dataset = open_dataset(data)
    refuse_unequal_ranks(config, dataset)
    return dataset


def build_data(
    config: Config, dataset: Dataset, world: World, *, context_tokens: int, accumulation: int
) -> TrainingData:
    """This rank's share of the data. DataError, ConfigError: what packing, mixing or the sizes do not allow."""
    data, ranks = config.data, world.ranks
    sources = training_sources(dataset, data, context_tokens=context_tokens)
    _refuse_idle_stream_settings(data, is_stream=any(isinstance(source.rows, StreamSpec) for source in sources))
    share = Share(rank=ranks.rank, world_size=world.size, batch_size=data.train_batch_size)
    feed = Feed(
        sources,
        seed=data.seed,
        num_lanes=share.step_size(accumulation),
        num_workers=_num_workers(data, ranks),
        rank=ranks.rank,
    )
    rows, mixture = validation_sources(dataset, data, sources, context_tokens=context_tokens)
    val_share = Share(rank=ranks.rank, world_size=world.size, batch_size=data.val_batch_size or data.train_batch_size)
    return TrainingData(
        loader=Loader(
            feed,
            share,
            context_tokens=context_tokens,
            prefetch_steps=data.prefetch_steps,
            pin=world.device.type == "cuda",
        ),
        feed=feed,
        validation=partial(
            validation_batches,
            rows,
            mixture,
            val_share,
            context_tokens=context_tokens,
            num_batches=config.train.validation_batches,
        ),
        samples_per_epoch=feed.num_samples,
        identity={
            "fingerprint": dataset.fingerprint,
            "seed": data.seed,
            "context": context_tokens,
            "packing": [
                vars(packing_of(data, kind=member.kind, is_stream=isinstance(member.train, Text)))
                for member in dataset.members
            ],
            "shuffle_window": data.shuffle_window if feed.is_stream else None,
        },
    )


def _refuse_idle_stream_settings(data: DataConfig, *, is_stream: bool) -> None:
    """Raises ConfigError for settings of streams that nothing here could act on."""
    for name in () if is_stream else ("shuffle_window", "num_workers"):
        if getattr(data, name) != getattr(_DEFAULTS, name):
            raise ConfigError(
                f"--{name}={getattr(data, name)} acts only on a stream, and --dataset={data.dataset} is read as token "
                f"bins, wholly shuffled; drop the flag or set --streaming=1"
            )


def _num_workers(data: DataConfig, ranks: Ranks) -> int:
    """--num_workers, or this rank's share of the node's cores less one for itself."""
    if data.num_workers is not None:
        return data.num_workers
    cores = len(os.sched_getaffinity(0)) // ranks.local_world_size
    return max(0, min(_MOST_WORKERS, cores - 1))
