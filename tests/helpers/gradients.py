"""What tests of differentiable ops do alike."""

from contextlib import nullcontext

import torch


def value_and_gradients(op, case, names, dtype=torch.float32, **kwargs):
    """The output as "out", and the gradients of the arguments `names` for a fixed cotangent."""
    leaves = {n: case[n].detach().to(dtype).clone().requires_grad_() for n in names}
    out = op(**{**case, **leaves, **kwargs})
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return dict(zip(("out", *names), (out.detach(), *grads), strict=True))


def assert_as_accurate_as_eager(run, impl, spare, memory=nullcontext):
    """Errors against float64 are at most twice those of the reference in float32, and a rest.

    Args:
        run: called as `run(dtype, impl=...)`, gives named tensors.
        spare: called with a name and all exact values: the absolute error that is fine anyway.
        memory: context in which the implementation runs.
    """
    exact = run(torch.float64, impl="reference")
    eager = run(torch.float32, impl="reference")
    with memory():
        fused = run(torch.float32, impl=impl)
    for name, value in exact.items():
        if value.numel() == 0:
            continue
        allowed = 2 * (eager[name] - value).abs().max() + spare(name, exact)
        error = (fused[name] - value).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_same_for_any_threads(run):
    """`run()` gives the same bits, in named tensors, on 1, 2 and 4 threads, and again on 2."""
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 4):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name
