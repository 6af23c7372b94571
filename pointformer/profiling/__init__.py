"""Time of a model by op, beside the least time that its work can take.

`record` lists the calls of a model's ops and layers with their work, `measure_limits` says what the
device reaches, `time_call` times one call, and `profile` puts all of it in one report.
"""

from pointformer.profiling.machine import Limits, describe_machine, measure_limits
from pointformer.profiling.ops import LAYERS, OPS, Call, Op
from pointformer.profiling.record import record
from pointformer.profiling.report import Row, profile, table
from pointformer.profiling.timing import Times, time_call
from pointformer.profiling.traffic import Traffic
from pointformer.profiling.work import Work

__all__ = [
    "LAYERS",
    "OPS",
    "Call",
    "Limits",
    "Op",
    "Row",
    "Times",
    "Traffic",
    "Work",
    "describe_machine",
    "measure_limits",
    "profile",
    "record",
    "table",
    "time_call",
]
