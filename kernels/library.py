"""The `pointformer` namespace of registered ops."""

import torch

LIBRARY = torch.library.Library("pointformer", "DEF")
