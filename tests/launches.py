"""What a model launches, counted without a GPU: Triton kernels, and ops of torch."""

from collections import Counter
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from pointformer.profiling.launches import recorded

# Ops that only describe or allocate memory, and start nothing on a device.
_FREE = {
    *("as_strided", "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "permute"),
    *("transpose", "t", "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "split"),
    *("split_with_sizes", "unbind", "unfold", "empty", "empty_strided", "empty_like", "resize_"),
    *("new_empty", "lift_fresh", "resolve_conj", "resolve_neg", "flatten", "unflatten", "chunk"),
    *("narrow", "movedim", "view_as", "expand_as", "diagonal", "is_nonzero", "item", "numel"),
    *("_local_scalar_dense", "result_type", "to", "contiguous", "set_", "swapaxes", "mT"),
}
# Ops that are one launch on a GPU, and several steps on a CPU.
_WHOLE = {
    *("addmm", "mm", "bmm", "baddbmm", "convolution", "native_layer_norm", "sort", "_softmax"),
    *("cumsum", "sum", "mean", "index", "gather", "cat", "searchsorted", "copy_", "native_dropout"),
}


@dataclass(frozen=True)
class Launches:
    """Counts by name: of Triton kernels, and of ops of torch that start work themselves."""

    kernels: Counter[str]
    torch_ops: Counter[str]

    @property
    def total(self) -> int:
        return self.kernels.total() + self.torch_ops.total()


def launches(model, images) -> Launches:
    """One call of a model with impl="triton" on CPU tensors; its output has no meaning."""
    with recorded() as found, profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(images)
    ops: Counter[str] = Counter()
    for event in profiler.events():
        if not _starts_work(event) or any(_whole(parent) for parent in _parents(event)):
            continue
        if _whole(event) or not any(_starts_work(child) for child in event.cpu_children):
            ops[event.name] += 1
    return Launches(Counter(launch.variant.name for launch in found), ops)


def _starts_work(event):
    kind, _, name = event.name.partition("::")
    return kind == "aten" and name not in _FREE


def _whole(event):
    return event.name.removeprefix("aten::") in _WHOLE


def _parents(event):
    while (event := event.cpu_parent) is not None:
        yield event
