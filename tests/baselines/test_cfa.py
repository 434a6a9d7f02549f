"""CFA's loss, bank and score against slow ones, and its relation to ConPatch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import pydefect
from pydefect.baselines.cfa import Cfa, CfaConfig, Descriptor, build_bank, soft_boundary_loss
from pydefect.baselines.detector import Context, each_image
from pydefect.ops import reference


def slow_loss(patches: torch.Tensor, bank: torch.Tensor, radius: torch.Tensor, config: CfaConfig):
    """L_att + L_rep from the whole table of squared distances."""
    squared = (patches.unsqueeze(1) - bank).square().sum(2).sort(1).values
    k = min(config.neighbors, len(bank))
    attraction = (squared[:, :k] - radius**2).clamp_min(0).mean()
    others = squared[:, k : k + config.hard_negatives]
    if not others.numel():
        return attraction
    return attraction + (radius**2 - others - config.margin).clamp_min(0).mean()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 9),
    radius=st.sampled_from([1e-5, 0.3, 2.0, 4.0]),
    learn=st.booleans(),
)
def test_the_loss_and_its_gradients(seed, size, radius, learn):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(11, 4, generator=generator).requires_grad_()
    bank = torch.randn(size, 4, generator=generator)
    config = CfaConfig(neighbors=2, hard_negatives=3, margin=0.1)
    r = torch.tensor(radius, requires_grad=learn)
    loss = soft_boundary_loss(patches, bank, r, config)
    loss.backward()

    slow_patches = patches.detach().double().requires_grad_()
    slow_r = torch.tensor(radius, dtype=torch.float64, requires_grad=True)
    expected = slow_loss(slow_patches, bank.double(), slow_r, config)
    expected.backward()
    # float32 sums of some twenty terms.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(patches.grad.double(), slow_patches.grad, rtol=1e-4, atol=1e-6)
    if learn:
        torch.testing.assert_close(r.grad.double(), slow_r.grad, rtol=1e-5, atol=1e-6)


def test_the_published_repulsion_never_acts():
    """r^2 = 1e-10 is below the margin, and no distance is negative."""
    config = CfaConfig()
    patches, bank = torch.zeros(4, 3), torch.zeros(9, 3)
    assert float(slow_loss(patches, bank, torch.tensor(config.radius), config)) == 0
    strong = CfaConfig(radius=2.0)
    assert float(slow_loss(patches, bank, torch.tensor(2.0), strong)) == pytest.approx(3.9)


def images_of(cache, indices, descriptor):
    return (descriptor(levels)[0] for levels in each_image(cache, indices, Context(), ""))


def test_banks(cache):
    descriptor = Descriptor([6, 8, 10], 12, 1e-5, False)
    with torch.inference_mode():
        patches = torch.stack(list(images_of(cache, range(4), descriptor)))
        mean = build_bank(images_of(cache, range(4), descriptor), CfaConfig())
        torch.testing.assert_close(mean, patches.mean(0), rtol=1e-5, atol=1e-6)
        fewer = build_bank(images_of(cache, range(4), descriptor), CfaConfig(bank_compression=4))
        assert fewer.shape == (7, 12)
        # Centres of k-means are means of what they stand for.
        nearest = torch.cdist(mean, fewer).argmin(1)
        means = torch.stack([mean[nearest == centre].mean(0) for centre in range(7)])
        torch.testing.assert_close(fewer, means, rtol=1e-4, atol=1e-5)
        config = CfaConfig(bank="ema", bank_momentum=0.25)
        expected = patches[0]
        for image in patches[1:]:
            expected = 0.75 * expected + 0.25 * image[reference.assign_unique(expected, image)]
        moving = build_bank(images_of(cache, range(4), descriptor), config)
        torch.testing.assert_close(moving, expected, rtol=1e-5, atol=1e-6)


def test_the_map_is_weighted_by_the_softmin(cache):
    model = Cfa.fit(cache, range(4), CfaConfig(epochs=1, smoothing=0.0), Context())
    levels = cache.get([5])
    with torch.inference_mode():
        scores, maps = model.score(levels, (6, 5))
        patches = model.descriptor(levels)[0].double()
    distances = torch.cdist(patches, model.bank.double()).sort(1).values[:, :3]
    expected = F.softmin(distances, dim=1)[:, 0] * distances[:, 0]
    torch.testing.assert_close(maps[0].flatten().double(), expected, rtol=1e-4, atol=1e-5)
    assert float(scores) == float(maps.max())


def test_training_pulls_the_patches_to_the_bank(cache):
    model = Cfa.fit(cache, range(7), CfaConfig(epochs=5), Context())
    history = model.found["history"]
    assert len(history) == 5
    assert history[-1] < history[0]
    assert float(model.descriptor.radius.detach()) == pytest.approx(1e-5)
    learned = Cfa.fit(cache, range(7), CfaConfig(epochs=5, learn_radius=True), Context())
    assert float(learned.descriptor.radius.detach()) > 1e-3


def test_untrained_it_is_conpatch_with_cfas_settings(products, defective):
    """ConPatch takes its descriptor, its first bank and its score from CFA; the two share no line of it."""
    common = {"resize": None, "weights": "random", "epochs": 0, "calibration_folds": 0, "progress": False}
    common["backbone_precision"] = "float32"
    cfa = pydefect.fit(products, method="cfa", seed=5, **common)
    conpatch = pydefect.fit(
        products,
        preset="paper",
        seed=5,
        crop=None,
        gamma=1.0,
        bank="position_mean",
        image_score="max_map",
        **common,
    )
    one, other = cfa.score(defective), conpatch.score(defective)
    # Weight and input scale are multiplied in another order.
    np.testing.assert_allclose(one.image_scores, other.image_scores, rtol=1e-4)
