"""What the attention kernels derive from neighborhoods, once per stage: lists of who attends whom.

A *tile* is `TILE` consecutive queries: neighbors on the curve share most of their clusters, so that
the union of their neighborhoods has about three times as many keys as one of them. A *group* is a
few consecutive clusters, about `GROUP_KEYS` keys, for the backward pass. For each tile there is the
list of clusters in its union, for each group the list of queries that attend to any of its
clusters, both ascending; a word of bits per entry says which queries of the tile attend to the
cluster, or to which clusters of the group the query attends. Lists are as long as the worst case
needs, so that nothing waits for the device.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.attention import TILE, clusters_per_group, tile_capacity
from pointformer.kernels.triton.inverse import inverse_lists
from pointformer.kernels.triton.runtime import Variant

_BLOCK = 32  # entries of one neighborhood, or of a group's list, at a time
_COPIES = 32  # of a number, stored at a time


def make_plan(cluster_index, cluster_offsets, cluster_size, training, copies):
    """The lists of tiles and, for training, those of groups."""
    tiles = tile_lists(cluster_index, cluster_offsets, copies)
    if not training:
        return tiles
    clusters = cluster_offsets.shape[0] - 1
    return [*tiles, *group_lists(cluster_index, clusters, cluster_size, copies)]


def tile_lists(cluster_index, cluster_offsets, copies=1):
    """For each tile the clusters in its union; `copies`: see `pointformer.kernels.attention`.

    Returns:
        counts (tiles,), first row of each cluster (tiles, capacity), its length (tiles, capacity),
        members (tiles, capacity): bit t is set if query t of the tile attends to it; all int32.
    """
    queries, per_query = cluster_index.shape
    clusters = cluster_offsets.shape[0] - 1
    tiles, capacity = -(-queries // TILE), tile_capacity(per_query, clusters)
    counts = _lists(cluster_index, tiles)
    rows, lengths, members = (_lists(cluster_index, tiles, capacity) for _ in range(3))
    if queries % (copies * TILE):  # tiles belong to several samples
        copies = 1
    queries, clusters, tiles = queries // copies, clusters // copies, tiles // copies
    variant = _tile_variant(per_query, copies > 1)
    variant.launch(
        (tiles, triton.cdiv(copies, variant.constants["COPIES"])),
        *(cluster_index.contiguous(), cluster_offsets.contiguous(), counts, rows, lengths, members),
        *(queries, per_query, clusters, capacity, tiles, copies),
    )
    return [counts, rows, lengths, members]


def group_lists(cluster_index, clusters, cluster_size, copies=1):
    """For each group of clusters the queries that attend to any of them; `copies` as above.

    Returns:
        begins (groups,), counts (groups,), queries (Q * R,), members (Q * R,): entries
        `begins[g]` to `begins[g] + counts[g]` are those of group g; bit c of a member word is set
        if the query attends to cluster c of the group; all int32.
    """
    group = clusters_per_group(cluster_size)
    groups = -(-clusters // group)
    cluster_index = cluster_index.contiguous()
    begins, counts = (_lists(cluster_index, groups) for _ in range(2))
    queries, members = (_lists(cluster_index, cluster_index.numel()) for _ in range(2))
    if clusters % (copies * group):  # groups belong to several samples
        copies = 1
    groups, clusters = groups // copies, clusters // copies
    cluster_index = cluster_index[: len(cluster_index) // copies]
    known = (cluster_index >= 0) & (cluster_index < clusters)
    offsets, entries = inverse_lists(torch.where(known, cluster_index // group, -1), groups)
    variant = _group_variant(group, copies > 1)
    variant.launch(
        (groups, triton.cdiv(copies, variant.constants["COPIES"])),
        *(cluster_index, entries, offsets, begins, counts, queries, members),
        *(*cluster_index.shape, groups, copies),
    )
    return [begins, counts, queries, members]


def _lists(cluster_index, *shape):
    return torch.empty(shape, dtype=torch.int32, device=cluster_index.device)


@triton.jit(do_not_specialize=("queries", "per_query", "clusters", "capacity", "tiles", "copies"))
def neighborhood_tiles_kernel(
    cluster_index, cluster_offsets, counts, rows, lengths, members, queries, per_query, clusters,
    capacity, tiles, copies, TILE: tl.constexpr, BLOCK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Walk the clusters of a tile in ascending order: each pass finds the next one.

    Its lists are stored for the tile and its copies, each `tiles` tiles and `queries` rows ahead.
    """
    tile = tl.program_id(0).to(tl.int64)
    copy = tl.program_id(1) * COPIES + tl.arange(0, COPIES)
    stored = copy < copies
    ahead = copy.to(tl.int64) * tiles * capacity
    lane = tl.arange(0, TILE)
    query = tile * TILE + lane
    beyond = 2147483647
    current = -1
    found = -1
    while current < beyond:
        attends = tl.zeros((TILE,), tl.int32)
        following = tl.full((TILE,), beyond, tl.int32)
        for start in range(0, per_query, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            cluster = tl.load(
                cluster_index + query[:, None] * per_query + slot[None, :],
                mask=(query < queries)[:, None] & (slot < per_query)[None, :],
                other=-1,
            )  # (TILE, BLOCK)
            cluster = tl.where(cluster < clusters, cluster, -1)
            attends = tl.maximum(attends, tl.max((cluster == current).to(tl.int32), 1))
            later = tl.where(cluster > current, cluster, beyond)
            following = tl.minimum(following, tl.min(later, 1))
        if found >= 0:
            entry = tile * capacity + found
            row = tl.load(cluster_offsets + current)
            length = tl.load(cluster_offsets + current + 1) - row
            word = tl.sum(attends << lane, 0)
            tl.store(rows + entry + ahead, row + copy * queries, mask=stored)
            tl.store(lengths + entry + ahead, length, mask=stored)
            tl.store(members + entry + ahead, word, mask=stored)
        current = tl.min(following, 0)
        found += 1
    tl.store(counts + tile + copy * tiles, found, mask=stored)


@triton.jit(do_not_specialize=("rows", "per_query", "groups", "copies"))
def neighborhood_groups_kernel(
    cluster_index, entries, offsets, begins, counts, queries, members, rows, per_query, groups,
    copies, GROUP: tl.constexpr, BLOCK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Join the entries of a group that belong to the same query; they follow each other.

    Its list is stored for the group and its copies, each `groups` groups and `rows` queries ahead.
    """
    group = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COPIES
    begin = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    found = 0
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = entry < end
        query = tl.load(entries + entry, mask=inside, other=0).to(tl.int32) // per_query
        before = inside & (entry > begin)
        previous = tl.load(entries + entry - 1, mask=before, other=0).to(tl.int32) // per_query
        new = inside & ((entry == begin) | (query != previous))
        word = tl.zeros((BLOCK,), tl.int32)
        for ahead in tl.static_range(GROUP):
            listed = entry + ahead < end
            source = tl.load(entries + entry + ahead, mask=listed, other=0).to(tl.int32)
            same = listed & (source // per_query == query)
            cluster = tl.load(cluster_index + source, mask=same, other=0)
            local = tl.where(same, cluster - group.to(tl.int32) * GROUP, 0)
            word |= same.to(tl.int32) << local
        place = begin + found + tl.cumsum(new.to(tl.int32), 0) - 1
        if COPIES == 1:
            tl.store(queries + place, query, mask=new)
            tl.store(members + place, word, mask=new)
        else:
            for copy in range(first, tl.minimum(first + COPIES, copies)):
                tl.store(queries + place + copy * rows * per_query, query + copy * rows, mask=new)
                tl.store(members + place + copy * rows * per_query, word, mask=new)
        found += tl.sum(new.to(tl.int32), 0)
    every = first + tl.arange(0, COPIES)
    stored = every < copies
    tl.store(begins + group + every * groups, begin + every * rows * per_query, mask=stored)
    tl.store(counts + group + every * groups, found, mask=stored)


def _tile_rounds(a):
    index, size = a["cluster_index"][: a["queries"]], a["TILE"] * a["per_query"]
    padding = a["tiles"] * size - index.numel()
    index = torch.nn.functional.pad(index.flatten(), (0, padding), value=-1)
    index = index.view(-1, size).sort(1).values
    new = index >= 0
    new[:, 1:] &= index[:, 1:] != index[:, :-1]
    a["counts"].copy_(new.sum(1).repeat(a["copies"]))
    passes = new.sum(1).double().mean().item() + 1
    return {"current": passes, "start": passes * triton.cdiv(a["per_query"], a["BLOCK"])}


def _group_rounds(a):
    begins, query = a["offsets"].long(), a["entries"] // a["per_query"]
    new = torch.ones_like(query)
    new[1:] = query[1:] != query[:-1]
    new[begins[:-1].clamp(max=len(new) - 1)] = 1
    before = torch.nn.functional.pad(new.cumsum(0), (1, 0))
    a["counts"].copy_((before[begins[1:]] - before[begins[:-1]]).repeat(a["copies"]))
    steps = (-(-begins.diff() // a["BLOCK"])).double().mean().item()
    return {"start": steps, "copy": steps * min(a["copies"], a["COPIES"])}


@cache
def _tile_variant(per_query, copied):
    return Variant(
        neighborhood_tiles_kernel,
        (torch.int32,) * 6 + ("i32",) * 6,
        {
            "TILE": TILE,
            "BLOCK": min(_BLOCK, triton.next_power_of_2(max(per_query, 1))),
            "COPIES": _COPIES if copied else 1,
        },
        writes=("counts", "rows", "lengths", "members"),
        num_warps=1,
        rounds=_tile_rounds,
    )


@cache
def _group_variant(group, copied):
    return Variant(
        neighborhood_groups_kernel,
        (torch.int32, torch.int64) + (torch.int32,) * 5 + ("i32",) * 4,
        {"GROUP": group, "BLOCK": _BLOCK, "COPIES": _COPIES if copied else 1},
        writes=("begins", "counts", "queries", "members"),
        tiles={"BLOCK": (64,)},
        num_warps=1,
        rounds=_group_rounds,
    )


def variants():
    """Every specialization that the functions above can launch."""
    for copied in (False, True):
        for per_query in (1, 2, 4, 8, 16, 32):
            yield _tile_variant(per_query, copied)
        for group in sorted({clusters_per_group(size) for size in range(1, 33)}):
            yield _group_variant(group, copied)
