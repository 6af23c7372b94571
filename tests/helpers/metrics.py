"""Metrics between two processes."""

import safetensors.numpy


def scored(make, pairs):
    """A metric of predictions and annotations that goes through a file after each of them."""
    metric = make()
    for predicted, annotation in pairs:
        metric.update(predicted, annotation)
        content = safetensors.numpy.save(metric.state())
        metric = make()
        metric.load(safetensors.numpy.load(content))
    return metric
