"""How often the same data may be read: constants with their sources. No numpy, so that plans answer at once."""

from __future__ import annotations

import math

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
