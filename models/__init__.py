"""AutoFocusFormer and its heads, built from the public ops."""

from pointformer.models.checkpoints import (
    CheckpointError,
    load_model,
    load_released,
    load_state,
    save_model,
)
from pointformer.models.complexity import Complexity, count
from pointformer.models.config import AFFConfig, SwinConfig
from pointformer.models.grid import GridBackbone, token_sets
from pointformer.models.model import Model, Preprocess
from pointformer.models.registry import create_model, list_models

__all__ = [
    "AFFConfig",
    "CheckpointError",
    "Complexity",
    "GridBackbone",
    "Model",
    "Preprocess",
    "SwinConfig",
    "count",
    "create_model",
    "list_models",
    "load_model",
    "load_released",
    "load_state",
    "save_model",
    "token_sets",
]
