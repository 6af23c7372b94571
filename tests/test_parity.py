"""The released AFF's own numbers for made-up weights and images (see tests/parity/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity.recipe import checksum, load_shapes, make_image, make_state_dict

from pointformer.models import create_model
from pointformer.models.checkpoints import load_state, released_name

PARITY = Path(__file__).parent / "parity"
CASES = {
    "mini_224": ("aff_mini", 224, 224, 2, 1),
    "mini_160x192": ("aff_mini", 160, 192, 1, 1),
    "tiny_224": ("aff_tiny", 224, 224, 1, 2),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Stored arrays, our stages' outputs and logits of a case."""
    name, height, width, batch, seed = CASES[request.param]
    stored = dict(np.load(PARITY / f"{request.param}.npz"))
    state = make_state_dict(load_shapes(PARITY / f"shapes/{name}.json"), seed)
    image = make_image(height, width, batch, seed)
    assert checksum(state) == stored["state_crc32"]
    assert checksum({"image": image}) == stored["image_crc32"]
    model = create_model(name).eval()
    ours = {released_name(key): key for key in model.state_dict()}
    load_state(model, {ours[k]: torch.from_numpy(np.asarray(v)) for k, v in state.items()}, name)
    patch = {}
    model.backbone.patch_embed.register_forward_hook(lambda m, a, out: patch.update(tokens=out))
    with torch.no_grad():
        stages = model.backbone(torch.from_numpy(image))
        logits = model.head(stages, torch.from_numpy(image), None)
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


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_stage(case, stage):
    """Same tokens in the same rows; same order, features and scores."""
    stored, _, stages, _ = case
    output = stages[stage - 1]
    tokens = output.tokens
    assert torch.equal(
        tokens.positions, per_sample(stored, f"s{stage}_positions").to(torch.float32)
    )
    order = per_sample(stored, f"s{stage}_order")
    starts = tokens.batch_offsets[tokens.sample_index]
    assert torch.equal(tokens.clusters.order - starts, order)
    torch.testing.assert_close(
        tokens.features, per_sample(stored, f"s{stage}_features"), atol=1e-4, rtol=0
    )
    if stage < 4:
        torch.testing.assert_close(
            output.scores, per_sample(stored, f"s{stage}_scores"), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["aff_mini", "aff_mini_1_5th", "aff_tiny", "aff_small"])
def test_state_dict_has_the_released_keys(name):
    released = load_shapes(PARITY / f"shapes/{name}.json")
    own = {released_name(k): tuple(v.shape) for k, v in create_model(name).state_dict().items()}
    assert own == released
