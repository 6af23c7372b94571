"""Models that are small enough to run in milliseconds."""

from pointformer.models import AFFConfig

SMALL = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)
