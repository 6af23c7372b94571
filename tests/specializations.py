"""What Triton would compile at launches, noted without a GPU, and what is compiled ahead of time.

    python tests/specializations.py

Prints one JSON object. It runs in a process of its own, because Triton's interpreter, which the
other tests use, must be off.
"""

import json
from collections import defaultdict
from unittest import mock

import torch
import triton
from aot import _module, modules
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from helpers.gradients import value_and_gradients
from helpers.merge import NET, make_case
from pointformer import (
    _dispatch,
    interpolate,
    neighborhood_attention,
    point_conv,
    scored_merge,
    weighted_gather,
)
from pointformer.kernels.triton.runtime import Variant

TARGET = GPUTarget("cuda", 90, 32)


class StandIn:
    """A driver that knows what to compile for; nothing is launched."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: TARGET)


def may_be_specialized():
    """Integers of kernels that Triton may compile anew for some of their values."""
    found = set()
    for module in modules():
        for variant in _module(module).variants():
            given = [p for p in variant.kernel.params if p.name not in variant.constants]
            for parameter, kind in zip(given, variant.arguments, strict=True):
                if kind in ("i32", "i64") and not parameter.do_not_specialize:
                    found.add(f"{variant.name}: {parameter.name}")
    return sorted(found)


def run(size, k):
    """Ops of so many queries on so many tokens, values and gradients."""
    for mid in (5, 4):
        case = make_case((size,), cluster_size=k, num_clusters=k, channels=16 * k, mid=mid)
        value_and_gradients(scored_merge, case, ("features", *NET), impl="triton")
    heads = {name: torch.randn(size, k, 16) for name in ("query", "key", "value")}
    lists = {name: case[name] for name in ("positions", "neighborhoods")}
    value_and_gradients(neighborhood_attention, heads | lists, heads, impl="triton")
    values = {"position_value": torch.randn(k, 16, 5)}
    arguments = heads | lists | values
    value_and_gradients(neighborhood_attention, arguments, heads | values, impl="triton")
    index = torch.zeros(size, k, dtype=torch.int32)
    features, positions = case["features"], case["positions"]
    net = {name: case[name] for name in NET}
    gathered = {"features": features, "index": index, "weights": torch.rand(size, k)}
    listed = {"features": features, "positions": positions, "neighbor_index": index}
    value_and_gradients(point_conv, listed | net, ("features", *NET), impl="triton")
    value_and_gradients(weighted_gather, gathered, ("features", "weights"), impl="triton")
    elsewhere = {"query_positions": positions, "power": torch.tensor(6.0)}
    value_and_gradients(interpolate, listed | elsewhere, ("features", "power"), impl="triton")


def compiled(sizes):
    """By kernel and constants: what a variant is compiled for ahead of time, then all that Triton
    was about to compile for at launches of these sizes."""
    found = defaultdict(set)

    def name_of(variant):
        return " ".join((variant.name, *map(str, sorted(variant.constants.items()))))

    def code(signature, attributes):
        """Types of what is not constant, and what is assumed of it."""
        kinds = dict(enumerate(signature.items()))
        assumed = {kinds[i][0]: what for (i, *_), what in attributes.items()}
        given = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
        return "; ".join(f"{name} {kind} {assumed.get(name, '')}" for name, kind in given)

    def note(compile, **_):
        found[current[0]].add(code(compile["signature"], compile["configs"][0]))
        return True  # do not compile

    def launch(variant, *arguments):
        current[:] = [name_of(variant)]
        with mock.patch.object(triton, "compile", lambda source, **_: source):
            source = variant.compile(TARGET)
        ahead[current[0]] = code(source.signature, source.attrs)
        real(variant, *arguments)

    current, ahead, real = [], {}, Variant.launch
    driver.set_active(StandIn())
    triton.knobs.runtime.jit_cache_hook = note
    anywhere = mock.patch.object(_dispatch, "_device_lacks", return_value=None)
    with anywhere, mock.patch.object(Variant, "launch", launch):
        for size in sizes:
            run(*size)
    return {name: [ahead[name], *sorted(codes)] for name, codes in found.items()}


if __name__ == "__main__":
    sizes = [(size, k) for size in (1, 7, 16, 64) for k in (1, 4)]
    print(json.dumps({"may be specialized": may_be_specialized(), "compiled": compiled(sizes)}))
