"""What a machine without a GPU can tell about one: a device of shapes only, and dirty memory."""

import contextlib
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


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
    value of the device. Ops run as far as their fakes; no kernel is launched.
    """
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with capturing, FakeTensorMode(), _NoTransfers(), _WithoutDevice():
        yield


@contextlib.contextmanager
def dirty_memory():
    """`torch.empty` gives NaN, or integers far out of bounds, as memory with old values would."""
    empty = torch.empty

    def dirty(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else -(1 << 30))

    with mock.patch("torch.empty", dirty):
        yield
