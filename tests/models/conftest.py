"""Fixtures of this folder."""

import pytest
import torch
from tiny_models import tiny_model

from hypershard.config.schema import MODEL_TYPES, ModelConfig


@pytest.fixture(params=MODEL_TYPES)
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return tiny_model(request.param)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
