"""torch_geometric's Data and Batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pointformer import TokenSet, sizes_from_batch, sizes_from_ptr
from pointformer._checks import brief, describe
from pointformer.integrations._sets import set_of

_KNOWN = {"pos", "x", "batch", "ptr", "origin", "extent"}
_OWN = _KNOWN - {"x"} | {"num_nodes", "num_edges"}  # names that no field can have


def _data() -> Any:
    try:
        from torch_geometric import data
    except ImportError as error:
        raise ImportError(
            f"Data and Batch need {error.name}: pip install torch-geometric"
        ) from None
    return data


def from_pyg(data: Any) -> TokenSet:
    """A token set of a `Data`, one sample unless it has `batch` or `ptr`, or of a `Batch`.

    `pos` are the positions (float64 and integers get an origin), `x` the features if it is
    floating. The other attributes of nodes are fields, such as `y` of segmentation; those of edges
    and of whole graphs stay behind, but for `origin`, to which `pos` is relative, and `extent`,
    which `to_pyg` makes.

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
    elif (ptr := data.to_dict().get("ptr")) is not None and ptr[-1:].tolist() == [len(data.pos)]:
        sizes = sizes_from_ptr(ptr)  # of graphs; of others it is that of their edges
    origin, extent = (data.to_dict().get(name) for name in ("origin", "extent"))
    return set_of("data.pos", data.pos, features, sizes, origin, fields, extent)


def to_pyg(tokens: TokenSet) -> Any:
    """A `Batch` with `pos`, `x`, the fields, and `origin` and `extent` (B, D) where there are such.

    Raises:
        ValueError: torch_geometric takes a field for something else, by its name.
        ImportError: torch_geometric is missing.
    """
    kinds = _data()
    if not isinstance(tokens, TokenSet):
        raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
    for name, rows in tokens.fields.items():
        features = name == "x" and (tokens.channels > 0 or rows.is_floating_point())
        if features or name in _OWN or not _is_plain(kinds.Data, name):
            raise ValueError(
                f"tokens: field {name!r} would be changed or lost, since torch_geometric takes it "
                "for something else by its name; give it another one"
            )
    graphs = [_graph(kinds.Data, sample) for sample in tokens]
    if not graphs:
        return _graph(kinds.Batch, tokens, batch=tokens.sample_index, ptr=tokens.batch_offsets)
    return kinds.Batch.from_data_list(graphs)


def _is_plain(kind: Any, name: str) -> bool:
    """Whether an attribute of this name has a row per node, and batches have these as they are."""
    graph = kind(num_nodes=2)
    graph[name] = rows = torch.zeros(2)
    kept = graph.__cat_dim__(name, rows) == 0 and graph.__inc__(name, rows) == 0
    return kept and graph.is_node_attr(name)


def _graph(kind: Any, tokens: TokenSet, **more: Tensor) -> Any:
    graph = kind(pos=tokens.positions, num_nodes=tokens.num_tokens, **more)
    for name, rows in tokens.fields.items():
        graph[name] = rows
    if tokens.origin is not None:
        graph.origin = tokens.origin
    if tokens.extent is not None:
        extent = torch.tensor(tokens.extent, dtype=torch.float64)
        graph.extent = extent.view(len(tokens), tokens.dimensions)
    if tokens.channels:
        graph.x = tokens.features
    return graph
