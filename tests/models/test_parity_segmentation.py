"""The released segmentation models' own numbers for made-up weights and images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity.recipe import checksum, load_shapes, make_image, make_state_dict

from pointformer.models import create_model, load_state
from pointformer.models.mask2former import MaskDecoder
from pointformer.models.postprocess import semantic_scores
from pointformer.models.released import from_released, to_released

PARITY = Path(__file__).parents[1] / "parity"
CASES = {"seg_mini_ade_128x128": 1, "seg_mini_ade_128x128_b2": 2}


def released_model():
    state = make_state_dict(load_shapes(PARITY / "shapes/seg_ade20k_mini.json"), seed=3)
    model = create_model(
        "aff_mini", head="mask2former", task="semantic", num_classes=150, position_norm="batch"
    )
    tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}
    load_state(model, from_released(tensors, model), "recipe")
    return model.eval(), checksum(state)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    stored = dict(np.load(PARITY / f"{request.param}.npz"))
    model, crc = released_model()
    image = make_image(128, 128, CASES[request.param], seed=3)
    assert crc == stored["state_crc32"]
    assert checksum({"image": image}) == stored["image_crc32"]
    image = torch.from_numpy(image)
    with torch.no_grad():
        tokens = model.head.features(model.backbone(image), image, None)
        mask_features, levels = model.head.pixel_decoder(tokens)
    return stored, model, tokens, mask_features, levels


def packed(array):
    return torch.from_numpy(array).flatten(0, 1)


def close(ours, theirs):
    """Within 1e-3 of the root mean square of what it should be."""
    bound = 1e-3 * theirs.square().mean().sqrt()
    assert (ours - theirs).abs().max() <= bound


def test_backbone(case):
    stored, _, tokens, _, _ = case
    for i, stage in enumerate(tokens):
        assert torch.equal(stage.positions, packed(stored[f"res{i + 2}_pos"]).float())
        if f"res{i + 2}" in stored:  # the second case stores less
            close(stage.features, packed(stored[f"res{i + 2}"]))


def test_pixel_decoder(case):
    stored, _, _, mask_features, levels = case
    if "mask_features" in stored:
        close(mask_features.features, packed(stored["mask_features"]))
    for level, name in zip(levels, ("res5", "res4", "res3"), strict=True):
        if f"pix_{name}" in stored:
            close(level.features, packed(stored[f"pix_{name}"]))


def test_decoder(case, monkeypatch):
    """All layers' classes and masks. A mask bit on its threshold must not decide: where the file
    has them, ours are counted and theirs are used."""
    stored, model, _, mask_features, levels = case
    own, differing = MaskDecoder.allowed, []

    def allowed(mask_logits, rows, present):
        ours = own(mask_logits, rows, present)
        blocked = torch.from_numpy(stored[f"attn_block_{len(differing)}"])
        theirs = ~blocked | blocked.all(2, keepdim=True)
        differing.append((ours != theirs).float().mean().item())
        return theirs

    if "attn_block_0" in stored:
        monkeypatch.setattr(MaskDecoder, "allowed", staticmethod(allowed))
    with torch.no_grad():
        out = model.head.decoder(mask_features, levels)
    assert max(differing, default=0) < 1e-3
    close(out.class_logits, torch.from_numpy(stored["pred_logits"]))
    close(out.masks(), torch.from_numpy(stored["pred_masks"]))
    if "semseg_argmax" in stored:
        scores = torch.stack(semantic_scores(out, [(128, 128)] * len(out.class_logits)))
        same = scores.argmax(1) == torch.from_numpy(stored["semseg_argmax"].astype(np.int64))
        assert same.float().mean() >= 0.999
    if "aux_logits" in stored:
        for ours, theirs in zip(out.auxiliary, stored["aux_logits"], strict=True):
            close(ours.class_logits, torch.from_numpy(theirs))
        close(out.auxiliary[0].masks(), torch.from_numpy(stored["aux0_masks"]))


def test_state_dict_has_the_released_keys():
    released = load_shapes(PARITY / "shapes/seg_ade20k_mini.json")
    model = create_model("aff_mini", head="mask2former", num_classes=150)
    own = to_released(model.state_dict(), model.config, "mask2former")
    assert {key: tuple(value.shape) for key, value in own.items()} == released
    assert sum(p.numel() for p in model.parameters()) == 25_800_296
