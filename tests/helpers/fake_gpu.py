"""What a machine without a GPU can tell about one: a device of shapes only, and dirty memory."""

import contextlib
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pointformer.kernels.triton.runtime import Variant


class _NoTransfers(TorchDispatchMode):
    """Fails where host and device exchange values; a fake tensor has none to read."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        inputs = [x for x in args if isinstance(x, torch.Tensor)]
        outputs = [result] if inputs and isinstance(result, torch.Tensor) else []
        # Kernels get numbers of the host as scalars, and so do registered ops.
        devices = {x.device.type for x in (*inputs, *outputs) if x.dim() or x.device.type != "cpu"}
        if len(devices) > 1 and op.namespace != "pointformer":
            raise AssertionError(f"{op.name()} copies between host and device")
        return result


class _Launches(TorchDispatchMode):
    """Runs the launchers of registered ops, and notes what a GPU would have to start."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "pointformer":
            with self, _WithoutDevice():
                return op.redispatch(_CUDA, *args, **kwargs)
        if op.namespace != "prim" and not op.is_view and op._opname not in _NOTHING:
            self.names.append(op._opname)
        return op(*args, **kwargs)

    def launch(self, variant, grid, *arguments):
        if 0 not in variant.programs(grid):
            self.names.append(variant.name)


_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_NOTHING = {  # ops that start nothing, beside views
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "sym_size", "_assert_async"),
    "promote_types",
}


class _WithoutDevice(TorchFunctionMode):
    """Methods by plain ops: torch's own ask for the device, which CPU builds do not know."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            view, tensors = _view(*args)
            return torch.ops.aten.index(view, tensors) if tensors else view
        if function is torch.Tensor.__setitem__:
            view, tensors = _view(*args[:2])
            value = args[2]
            if not isinstance(value, torch.Tensor):
                value = torch.full((), value, dtype=view.dtype, device=view.device)
            if tensors:
                return torch.ops.aten.index_put_(view, tensors, value)
            return torch.ops.aten.copy_(view, value)
        if function is torch.Tensor.__invert__:
            return torch.bitwise_not(*args)
        if function is torch.Tensor.contiguous and not args[0].is_contiguous():
            return torch.clone(args[0], memory_format=torch.contiguous_format)
        return function(*args, **(kwargs or {}))


def _view(tensor, index):
    """The basic part of an index applied, and the tensors of the advanced part, one per axis."""
    index = list(index) if isinstance(index, tuple) else [index]
    places = [place for place, part in enumerate(index) if part is Ellipsis] or [len(index)]
    used = sum(part is not None and part is not Ellipsis for part in index)
    index[places[0] : places[0] + 1] = [slice(None)] * (tensor.dim() - used)
    axis, tensors = 0, []
    for part in index:
        if part is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, axis, part.start, part.stop, part.step or 1)
        elif isinstance(part, torch.Tensor):
            tensors += [None] * (axis - len(tensors)) + [part]
        else:
            tensor = torch.ops.aten.select(tensor, axis, part)
            continue
        axis += 1
    return tensor, tensors


@contextlib.contextmanager
def fake_gpu():
    """Tensors on "cuda" have shapes but no values here, and a CUDA graph seems to be captured.

    What a capture does not allow is an error: copies between host and device, and whatever needs a
    value of the device. The launchers of registered ops run too, up to their kernels.

    Yields:
        a list that grows: the names of what is launched, kernels and torch's ops (some of those,
        such as sorts, are several kernels).
    """
    launches = _Launches()
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    kernels = mock.patch.object(Variant, "launch", lambda *given: launches.launch(*given))
    with capturing, kernels, FakeTensorMode(), _NoTransfers(), launches, _WithoutDevice():
        yield launches.names


@contextlib.contextmanager
def dirty_memory():
    """New tensors are NaN, or integers far out of bounds, as memory with old values would be."""

    def dirty(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -(1 << 30))

        return made

    with contextlib.ExitStack() as patches:
        made = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
        made += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
        for owner, name in made:
            patches.enter_context(mock.patch.object(owner, name, dirty(getattr(owner, name))))
        yield
