"""torch_geometric's Data and Batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pointformer import TokenSet, sizes_from_batch
from pointformer._checks import brief, describe

_KNOWN = {"pos", "x", "batch", "ptr", "origin", "extent"}


def _data() -> Any:
    try:
        from torch_geometric import data
    except ImportError as error:
        raise ImportError(
            f"Data and Batch need {error.name}: pip install torch-geometric"
        ) from None
    return data


def from_pyg(data: Any) -> TokenSet:
    """A token set of a `Data`, one sample, or of a `Batch`.

    `pos` are the positions (float64 gets an origin), `x` the features if it is floating. The other
    attributes of nodes are fields, such as `y` of segmentation; those of edges and of whole graphs
    stay behind, but for `origin` and `extent`, which `to_pyg` makes.

    Raises:
        TypeError, ValueError: it is neither, has no `pos`, or something does not fit.
        ImportError: torch_geometric is missing.
    """
    kinds = _data()
    if not isinstance(data, kinds.Data):
        raise TypeError(f"data: expected a Data or Batch, got {describe(data)}")
    if data.pos is None:
        raise ValueError(f"data: expected positions in pos, got only {brief(data.keys())}")
    features: Tensor | None = data.x
    fields = {}
    for name, value in data.to_dict().items():
        if name not in _KNOWN and isinstance(value, Tensor) and data.is_node_attr(name):
            fields[name] = value
    if features is not None and not features.is_floating_point():
        fields["x"], features = features, None
    if features is not None and features.dim() == 1:
        features = features[:, None]
    sizes = None
    if data.batch is not None:
        samples = data.num_graphs if isinstance(data, kinds.Batch) else None
        sizes = sizes_from_batch(data.batch, samples)
    extent = data.to_dict().get("extent")
    if data.pos.dtype == torch.float64:
        return TokenSet.from_world(data.pos, features, sizes, extent, fields=fields)
    origin = data.to_dict().get("origin")
    origin = None if origin is None else origin.double().cpu()
    return TokenSet(data.pos.float(), features, sizes, extent, origin, fields=fields)


def to_pyg(tokens: TokenSet) -> Any:
    """A `Batch` with `pos`, `x`, the fields, and `origin` and `extent` (B, D) where there are such.

    Raises:
        ImportError: torch_geometric is missing.
    """
    kinds = _data()
    if not isinstance(tokens, TokenSet):
        raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
    graphs = []
    for sample in tokens:
        more = dict(sample.fields)
        if sample.origin is not None:
            more["origin"] = sample.origin
        if sample.extent is not None:
            more["extent"] = torch.tensor(sample.extent)
        if sample.channels:
            more["x"] = sample.features
        graphs.append(kinds.Data(pos=sample.positions, num_nodes=sample.num_tokens, **more))
    return kinds.Batch.from_data_list(graphs)
