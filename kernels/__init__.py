"""Fast implementations of the ops: one file per op, registered with `torch.library`.

`kernels.<op>` holds the schema, the shape function and the gradient of an op; `kernels.cpu.<op>`
its CPU implementation. Nothing here imports the models or the functional layer above.
"""
