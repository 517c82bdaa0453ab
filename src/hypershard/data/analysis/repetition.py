"""How often the same data may be read: constants with their sources. No numpy, so that plans answer at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Repeated data: up to 4 epochs are nearly as good as new data, and the worth of later ones decays with R*_D. Both from
# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv:2305.16264 (abstract; section 6, whose
# unrounded constant is in the authors' repository, huggingface/datablations).
MOST_PRETRAINING_EPOCHS = 4
REPETITION_DECAY = 15.387756
MUENNIGHOFF = "Muennighoff et al. 2023, arXiv:2305.16264"
# Fine-tuning: under 5,000 samples 4 to 5 epochs, over 15,000 two, in between three. Practice rather than a law:
# Ouyang et al. 2022 (InstructGPT, section 3.5) saw the validation loss rise after one epoch, and answers improve on.
SMALL_FINE_TUNING_SAMPLES = 5_000
LARGE_FINE_TUNING_SAMPLES = 15_000
MOST_EPOCHS_SMALL, MOST_EPOCHS_MIDDLE, MOST_EPOCHS_LARGE = 5, 3, 2
OUYANG = "Ouyang et al. 2022, arXiv:2203.02155, section 3.5"


@dataclass(frozen=True, kw_only=True)
class DataWarning:
    """`code` for programs, `text` for people, `source` where it is known from ('' for the program's own rules)."""

    code: str
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.text} ({self.source})" if self.source else self.text


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often a plan reads a data set; None: not known.

    `epochs`: passes over it, packed; `unpacked_epochs`: with one sample a sequence, as trainers that do not pack.
    `steps_per_epoch`: steps of the plan in which it is read once.
    """

    epochs: float | None
    unpacked_epochs: float | None
    steps_per_epoch: float | None


def worth_in_epochs(epochs: float) -> float:
    """How many epochs of new data `epochs` passes over the same data are worth in pretraining: 4 -> 3.7, 40 -> 15.2."""
    if epochs <= 1:
        return epochs
    return 1 + REPETITION_DECAY * (1 - math.exp(-(epochs - 1) / REPETITION_DECAY))


def most_fine_tuning_epochs(num_samples: int) -> int:
    """Passes over a fine-tuning set of this size beyond which over-fitting is to be expected."""
    if num_samples < SMALL_FINE_TUNING_SAMPLES:
        return MOST_EPOCHS_SMALL
    return MOST_EPOCHS_LARGE if num_samples > LARGE_FINE_TUNING_SAMPLES else MOST_EPOCHS_MIDDLE


def small_set_warnings(num_samples: int | None) -> list[DataWarning]:
    """Of a fine-tuning set of this size."""
    if num_samples is None or num_samples >= SMALL_FINE_TUNING_SAMPLES:
        return []
    text = (
        f"{num_samples:,} samples are a small set (under {SMALL_FINE_TUNING_SAMPLES:,}), soon over-fitted: "
        f"validate often, and keep the checkpoint of the lowest validation loss"
    )
    return [DataWarning(code="small_set", text=text, source=OUYANG)]


def repetition_warnings(passes: Passes, *, num_samples: int | None, is_fine_tuning: bool) -> list[DataWarning]:
    """Of reading the same data too often; none where how often is not known."""
    epochs = passes.unpacked_epochs if passes.epochs is None else passes.epochs
    if epochs is None:
        return []
    if not is_fine_tuning:
        if epochs <= MOST_PRETRAINING_EPOCHS:
            return []
        text = (
            f"{epochs:.1f} epochs: up to {MOST_PRETRAINING_EPOCHS} are nearly as good as new data; these are worth "
            f"{worth_in_epochs(epochs):.1f}. Train shorter, or on more data"
        )
        return [DataWarning(code="repetition", text=text, source=MUENNIGHOFF)]
    if num_samples is None or epochs <= (most := most_fine_tuning_epochs(num_samples)):
        return []
    text = f"{epochs:.1f} epochs over {num_samples:,} samples"
    if passes.unpacked_epochs is not None and round(passes.unpacked_epochs, 1) != round(epochs, 1):
        text += f" ({passes.unpacked_epochs:.1f} where a sequence holds one sample)"
    text += f": over-fitting is likely beyond {most}"
    if passes.steps_per_epoch is not None:
        text += f", which are {int(most * passes.steps_per_epoch):,} steps"
    return [DataWarning(code="epochs", text=text, source=OUYANG)]
