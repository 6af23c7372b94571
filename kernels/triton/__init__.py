"""GPU implementations of the registered ops, in Triton: one file per op.

Every kernel file has `variants()`, which yields all `Variant`s that its launchers can choose; the
ahead-of-time tests compile them for several GPUs on machines without one.
"""
