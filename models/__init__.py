"""AutoFocusFormer and its heads, built from the public ops."""

from pointformer.models.complexity import Complexity, complexity_of
from pointformer.models.config import AFFConfig, PointConfig, SwinConfig
from pointformer.models.files import load_model, save_model
from pointformer.models.graphs import capture
from pointformer.models.grid import GridBackbone, token_sets
from pointformer.models.heads import Output
from pointformer.models.model import Model, Preprocess
from pointformer.models.points import PointPreprocess
from pointformer.models.registry import create_model, list_models
from pointformer.models.released import load_released
from pointformer.models.state import CheckpointError, load_state

__all__ = [
    "AFFConfig",
    "CheckpointError",
    "Complexity",
    "GridBackbone",
    "Model",
    "Output",
    "PointConfig",
    "PointPreprocess",
    "Preprocess",
    "SwinConfig",
    "capture",
    "complexity_of",
    "create_model",
    "list_models",
    "load_model",
    "load_released",
    "load_state",
    "save_model",
    "token_sets",
]
