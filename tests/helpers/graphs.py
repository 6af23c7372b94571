"""A stand-in for CUDA graphs on the CPU."""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pointformer.models import graphs


class _Graph(TorchDispatchMode):
    """Notes every op with the memory that it reads and writes; `replay` runs them on that again.

    As in a CUDA graph, what the host decided stays, and results stand where they stood. Unlike
    there, ops run while they are noted.
    """

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.ops.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        for op, args, kwargs, result in self.ops:
            again = op(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


@contextlib.contextmanager
def recorded_graphs():
    """`capture` takes tensors on the CPU, and records there."""

    def nothing(*args):
        return contextlib.nullcontext()

    with contextlib.ExitStack() as patches:
        for owner, name, fake in (
            (graphs, "_gpu_of", lambda leaves: None),
            (torch.cuda, "device", nothing),
            (torch.cuda, "stream", nothing),
            (torch.cuda, "Stream", mock.Mock()),
            (torch.cuda, "current_stream", mock.Mock()),
            (torch.cuda, "CUDAGraph", _Graph),
            (torch.cuda, "graph", lambda graph: graph),
        ):
            patches.enter_context(mock.patch.object(owner, name, fake))
        yield
