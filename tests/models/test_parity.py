"""The released AFF's own numbers for made-up weights and images (see tests/parity/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity.recipe import checksum, load_shapes, make_image, make_state_dict

from pointformer.models import aff, create_model, load_state
from pointformer.models.released import from_released, to_released

PARITY = Path(__file__).parents[1] / "parity"
CASES = {
    "mini_224": ("aff_mini", 224, 224, 2, 1),
    "mini_160x192": ("aff_mini", 160, 192, 1, 1),
    "tiny_224": ("aff_tiny", 224, 224, 1, 2),
}


def loaded(case):
    """Stored arrays of a case, its model and images."""
    name, height, width, batch, seed = CASES[case]
    stored = dict(np.load(PARITY / f"{case}.npz"))
    state = make_state_dict(load_shapes(PARITY / f"shapes/{name}.json"), seed)
    image = make_image(height, width, batch, seed)
    assert checksum(state) == stored["state_crc32"]
    assert checksum({"image": image}) == stored["image_crc32"]
    model = create_model(name).eval()
    tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}
    load_state(model, from_released(tensors, model), name)
    return stored, model, torch.from_numpy(image)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Stored arrays, our stages' outputs and logits of a case."""
    stored, model, image = loaded(request.param)
    patch = {}
    model.backbone.patch_embed.register_forward_hook(lambda m, a, out: patch.update(tokens=out))
    with torch.no_grad():
        stages = model.backbone(image)
        logits = model.head(stages, image, None)
    return stored, patch["tokens"], stages, logits


def per_sample(stored, key):
    """A (b, n, ...) array as a packed (b*n, ...) tensor."""
    array = stored[key]
    if array.dtype == np.uint16:
        array = array.astype(np.int64)
    return torch.from_numpy(array.reshape(-1, *array.shape[2:]))


def test_patch_features_and_logits(case):
    stored, patch, _, logits = case
    torch.testing.assert_close(
        patch.features, per_sample(stored, "patch_features"), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(logits, torch.from_numpy(stored["logits"]), atol=1e-4, rtol=0)


def kept_rows(stored, stage, scores):
    """Rows of a stage in the order of the next one's input, by the definition, from our scores.

    Scores differ in the last bit from CPU to CPU, and then those that are almost equal change
    places: the stored run decides which rows are kept, our scores in which order.
    """
    theirs = torch.from_numpy(stored[f"s{stage}_selection"])  # prior + 4 * score - 100 if reserved
    own = scores.view_as(theirs)
    fixed = (theirs - 4 * torch.from_numpy(stored[f"s{stage}_scores"])).round()
    rows = []
    for ranking, kept in zip(
        fixed + 4 * own, stored[f"s{stage}_kept"].astype(np.int64), strict=True
    ):
        reserved = torch.nonzero(ranking < -50).flatten()
        by_score = ranking.argsort(descending=True, stable=True)[: len(kept) - len(reserved)]
        rows.append(torch.cat([by_score, reserved]))
        assert set(rows[-1].tolist()) == set(kept.tolist())
    return torch.cat([r + i * theirs.shape[1] for i, r in enumerate(rows)])


def rows_at(positions, wanted):
    """For each wanted (sample, x, y) the row that has it; both hold the same, each once."""
    ours, theirs = ([tuple(p) for p in rows.tolist()] for rows in (positions, wanted))
    row = {place: i for i, place in enumerate(ours)}
    assert len(row) == len(ours) == len(theirs)
    assert row.keys() == set(theirs)
    return torch.tensor([row[place] for place in theirs])


def check_stage(stored, stages, stage):
    """Same tokens in the same rows, in an order that follows from the scores; same features and
    scores."""
    output = stages[stage - 1]
    tokens = output.tokens
    order = tokens.clusters.order
    if stage == 1:
        starts = tokens.batch_offsets[tokens.sample_index]
        assert torch.equal(order - starts, per_sample(stored, "s1_order"))
    else:
        before = stages[stage - 2]
        kept = kept_rows(stored, stage - 1, before.scores)
        assert torch.equal(before.tokens.positions[kept][order], tokens.positions)

    sample = tokens.sample_index[:, None]
    theirs = per_sample(stored, f"s{stage}_positions").to(torch.float32)
    rows = rows_at(torch.cat([sample, tokens.positions], 1), torch.cat([sample, theirs], 1))
    is_global = f"s{stage}_nearest_clusters" not in stored
    if is_global:  # its rows stay in the order of the scores
        assert torch.equal(order, torch.arange(len(order)))
    else:
        assert torch.equal(rows, torch.arange(len(rows)))
    torch.testing.assert_close(
        tokens.features[rows], per_sample(stored, f"s{stage}_features"), atol=1e-4, rtol=0
    )
    if stage < 4:
        torch.testing.assert_close(
            output.scores, per_sample(stored, f"s{stage}_scores"), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stage(case, stage):
    stored, _, stages, _ = case
    check_stage(stored, stages, stage)


def test_other_rounding_passes_and_another_order_does_not(monkeypatch):
    """What `check_stage` tells apart: scores as another CPU might round them, and centers that are
    not in the order of the scores."""
    stored, model, image = loaded("mini_224")
    noise = 3e-5 * torch.rand(2 * 56 * 56, generator=torch.Generator().manual_seed(0))
    score = model.backbone.stages[0].merge.score
    hook = score.register_forward_hook(lambda _, args, output: output + noise[:, None])
    with torch.no_grad():
        stages = model.backbone(image)
    order = stages[1].tokens.clusters.order.view(2, -1) - torch.tensor([[0], [784]])
    assert not torch.equal(order, torch.from_numpy(stored["s2_order"].astype(np.int64)))
    for stage in (1, 2, 3, 4):
        check_stage(stored, stages, stage)

    hook.remove()
    select = aff.select_centers
    monkeypatch.setattr(
        aff,
        "select_centers",
        lambda scores, *args, **options: select(
            scores + noise if len(scores) == len(noise) else scores, *args, **options
        ),
    )
    with torch.no_grad():
        stages = model.backbone(image)
    check_stage(stored, stages, 1)
    with pytest.raises(AssertionError):
        check_stage(stored, stages, 2)


@pytest.mark.parametrize("name", ["aff_mini", "aff_mini_1_5th", "aff_tiny", "aff_small"])
def test_state_dict_has_the_released_keys(name):
    released = load_shapes(PARITY / f"shapes/{name}.json")
    model = create_model(name)
    own = to_released(model.state_dict(), model.config)
    assert {key: tuple(value.shape) for key, value in own.items()} == released
