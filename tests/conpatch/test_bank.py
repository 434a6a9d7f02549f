"""The compressed bank's four builders against what each promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pydefect.conpatch.bank import BANKS, KCenterBank, bank_size, build_bank
from pydefect.errors import InputError

BUILDERS = ["ema", "position_mean", "kmeans", "kcenter"]


def images(count: int, patches: int = 32, d: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(patches, d, generator=generator) + 0.1 * index for index in range(count)]


def gamma_of(builder: str) -> float:
    return 1.0 if builder == "position_mean" else 4.0


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_size_does_not_depend_on_the_number_of_images(builder, count):
    bank = build_bank(iter(images(count)), builder, gamma=gamma_of(builder))
    assert bank.centres.shape == (round(32 / gamma_of(builder)), 4)
    assert torch.isfinite(bank.centres).all()


@pytest.mark.parametrize(
    ("patches", "gamma", "limit", "size"),
    [
        (3136, 4, None, 784),
        (3136, 1, None, 3136),
        (3136, 2, None, 1568),
        (10, 4, None, 2),
        (3, 8, None, 1),
        (1, 1, None, 1),
        (65536, 2, 8192, 8192),
        (65536, 8, 8192, 8192),
        (65536, 16, 8192, 4096),
        (3, 8, 1, 1),
    ],
)
def test_gamma_and_the_limit(patches, gamma, limit, size):
    assert bank_size(patches, gamma, limit) == size


@pytest.mark.parametrize("builder", ["ema", "kmeans", "kcenter"])
def test_a_limit_is_another_gamma(builder):
    """32 patches with at most 4 centres are 32 patches with gamma 8."""
    bank = build_bank(images(3), builder, gamma=2, max_size=4)
    assert torch.equal(bank.centres, build_bank(images(3), builder, gamma=8).centres)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_algorithm_1_line_by_line(momentum):
    data = images(5, patches=24, d=3)
    bank = build_bank(data, "ema", gamma=4, momentum=momentum)
    start = build_bank(data[:1], "ema", gamma=4, momentum=momentum)
    centres = start.centres.double().tolist()  # line 1: k-means of the first image
    for patches in (image.double().tolist() for image in data[1:]):  # line 2
        taken: list[int] = []
        for centre in centres:  # lines 4 to 7, all looked up from C_{i-1}
            free = [t for t in range(len(patches)) if t not in taken]
            taken.append(min(free, key=lambda t: math.dist(centre, patches[t])))
        centres = [  # line 8
            [(1 - momentum) * old + momentum * new for old, new in zip(centre, patches[t], strict=True)]
            for centre, t in zip(centres, taken, strict=True)
        ]
    # Four float32 averages of values around 1.
    torch.testing.assert_close(bank.centres.double(), torch.tensor(centres).double(), rtol=1e-5, atol=1e-6)


def test_k_means_start_is_a_fixed_point_of_lloyds_algorithm():
    """Line 1 of algorithm 1: every centre is the mean of the patches nearest to it (20 iterations end it
    here)."""
    (patches,) = images(1, patches=60, d=2)
    centres = build_bank([patches], "ema", gamma=12).centres
    nearest = torch.cdist(patches, centres).argmin(1)
    for index, centre in enumerate(centres):
        torch.testing.assert_close(patches[nearest == index].mean(0), centre, rtol=1e-4, atol=1e-5)


def test_the_position_mean_is_the_mean():
    data = images(7)
    bank = build_bank(data, "position_mean", gamma=1)
    # Seven running float32 averages instead of one sum.
    torch.testing.assert_close(bank.centres, torch.stack(data).mean(0), rtol=1e-5, atol=1e-6)


def test_k_means_loses_nothing():
    """Centres weighted by their counts keep the centre of mass of all that came after the start, and of the
    start itself."""
    data = images(9)
    start = build_bank(data[:1], "kmeans", gamma=4)
    bank = build_bank(data, "kmeans", gamma=4)
    assert float(start.counts.sum()) == 32
    assert float(bank.counts.sum()) == 9 * 32
    mass = (start.counts[:, None] * start.centres).sum(0) + torch.cat(data[1:]).sum(0)
    torch.testing.assert_close((bank.counts[:, None] * bank.centres).sum(0), mass, rtol=1e-4, atol=1e-3)


def test_k_means_moves_every_centre_to_the_mean_of_what_it_received():
    data = images(2, patches=40)
    start = build_bank(data[:1], "kmeans", gamma=8)
    bank = build_bank(data, "kmeans", gamma=8)
    nearest = torch.cdist(data[1], start.centres).argmin(1)
    for index in range(len(start.centres)):
        received = data[1][nearest == index]
        weight = float(start.counts[index])
        expected = (weight * start.centres[index] + received.sum(0)) / (weight + len(received))
        torch.testing.assert_close(bank.centres[index], expected, rtol=1e-5, atol=1e-5)
        assert float(bank.counts[index]) == weight + len(received)


def radii_and_bank(data: list[Tensor]) -> tuple[list[float], Tensor]:
    """The covering radius after every image, and the last centres."""
    bank = build_bank(data[:1], "kcenter", gamma=4)
    radii = [float(bank.squared_radius.sqrt())]
    for patches in data[1:]:
        before = bank.centres
        bank.update(patches)
        # An image without an uncovered patch changes nothing, and costs no reach.
        radii.append(0.0 if torch.equal(before, bank.centres) else float(bank.squared_radius.sqrt()))
    return radii, bank.centres


@pytest.mark.parametrize("seed", range(3))
def test_k_centre_covers_every_patch_ever_seen(seed):
    """A reduction with radius r leaves every centre and every uncovered patch within r of a new centre. A
    patch that was covered lay within the radius before, s, of an old centre, so it is within s + r. Later
    reductions move each centre's cover by at most their own radii: a patch of image i stays within s_{i-1}
    + r_i + r_{i+1} + ... of the last bank.
    """
    data = images(8, patches=40, seed=seed)
    radii, centres = radii_and_bank(data)
    standing = 0.0
    for index, patches in enumerate(data):
        reach = standing + sum(radii[index:])
        assert float(torch.cdist(patches, centres).amin(1).max()) <= reach * (1 + 1e-4)
        standing = radii[index] or standing


@pytest.mark.parametrize("seed", range(4))
def test_k_centres_radius_is_at_most_twice_the_best_one(seed):
    """M + 1 patches pairwise at least the radius apart exist, so any M centres leave two of them to one
    centre: no choice does better than half of it. The best choice of the patches themselves, found by
    trying all, is no better than that.
    """
    data = images(3, patches=5, d=2, seed=seed)
    bank = build_bank(data, "kcenter", gamma=2.5)
    assert len(bank.centres) == 2
    points = torch.cat(data)
    best = min(
        float(torch.cdist(points, points[list(chosen)]).amin(1).max())
        for chosen in itertools.combinations(range(len(points)), 2)
    )
    assert float(bank.squared_radius.sqrt()) <= 2 * best * (1 + 1e-5)


def test_k_centres_are_patches_that_came():
    data = images(5)
    everything = {tuple(patch) for patch in torch.cat(data).tolist()}
    centres = build_bank(data, "kcenter", gamma=4).centres.tolist()
    assert {tuple(centre) for centre in centres} <= everything
    assert len({tuple(centre) for centre in centres}) == 8


def test_k_centre_keeps_a_rare_patch():
    """What the averages lose: one normal patch far from all others, in one image of many."""
    data = images(9, d=3)
    rare = torch.tensor([30.0, 0.0, 0.0])
    data[3][5] = rare
    distances = {
        builder: float(torch.cdist(rare[None], build_bank(data, builder, gamma=4).centres).min())
        for builder in ("kcenter", "ema")
    }
    assert distances["kcenter"] == 0
    assert distances["ema"] > 20


def test_a_covered_image_leaves_k_centre_as_it_is():
    data = images(3)
    bank = build_bank(data, "kcenter", gamma=4)
    before = bank.centres
    bank.update(before[:4].repeat(8, 1))
    assert torch.equal(bank.centres, before)


@pytest.mark.parametrize("builder", ["ema", "kmeans", "kcenter"])
def test_nothing_but_one_patch(builder):
    """A constant image, such as a lens cap: fewer different patches than centres."""
    bank = build_bank([torch.full((16, 3), 0.5)] * 3, builder, gamma=4)
    assert bank.centres.shape == (4, 3)
    torch.testing.assert_close(bank.centres, torch.full((4, 3), 0.5))


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_bank_goes_on_from_its_state_as_if_it_had_never_stopped(builder):
    data = images(8)
    whole = build_bank(data, builder, gamma=gamma_of(builder), momentum=0.3)
    bank = build_bank(data[:4], builder, gamma=gamma_of(builder), momentum=0.3)
    state = {name: value.clone() for name, value in bank.state().items()}
    restored = BANKS[builder].from_state(state, momentum=0.3)
    for patches in data[4:]:
        restored.update(patches)
    assert restored.state().keys() == whole.state().keys()
    for name, value in whole.state().items():
        # The same operations on the same numbers; what k-centre measures again comes out the same.
        torch.testing.assert_close(restored.state()[name], value, rtol=0, atol=0)
    # Nothing was changed in place: what the restored bank came from still stands.
    assert all(torch.equal(bank.state()[name], value) for name, value in state.items())


@pytest.mark.parametrize("builder", ["ema", "kmeans", "kcenter"])
def test_the_order_of_the_images_matters_and_is_kept(builder):
    data = images(6)
    one = build_bank(data, builder, gamma=4)
    assert torch.equal(one.centres, build_bank(data, builder, gamma=4).centres)
    swapped = build_bank([data[0], *reversed(data[1:])], builder, gamma=4)
    assert not torch.equal(one.centres, swapped.centres)


@pytest.mark.parametrize(("settings", "centres"), [({"gamma": 4}, 8), ({"gamma": 1, "max_size": 31}, 31)])
def test_a_size_that_does_not_fit(settings, centres):
    message = f"{centres} centres for 32 patches an image; bank='position_mean' has one centre a patch"
    with pytest.raises(InputError, match=message):
        build_bank(images(1), "position_mean", **settings)


@pytest.mark.parametrize(
    ("builder", "patches", "message"),
    [
        ("position_mean", 31, "images: 31 patches; bank='position_mean' has one centre for each of 32"),
        ("ema", 7, "images: 7 patches; bank='ema' needs one for each of 8 centres"),
    ],
)
def test_an_image_that_does_not_fit_leaves_the_bank_alone(builder, patches, message):
    bank = build_bank(images(2), builder, gamma=gamma_of(builder))
    before = {name: value.clone() for name, value in bank.state().items()}
    with pytest.raises(InputError, match=message):
        bank.update(torch.zeros(patches, 4))
    assert all(torch.equal(bank.state()[name], value) for name, value in before.items())


def test_distances_kept_from_one_reduction_to_the_next_change_nothing():
    """Images with small changes, some large ones, and one of another size in between."""
    generator = torch.Generator().manual_seed(0)
    scene = torch.randn(60, 8, generator=generator)
    images = [scene + 0.1 * torch.randn(60, 8, generator=generator) for _ in range(12)]
    images[5][::7] += 2.0
    images.insert(8, images[3][:40])
    keeping, measuring = KCenterBank.start(images[0], 20), KCenterBank.start(images[0], 20)
    for patches in images[1:]:
        keeping.update(patches)
        measuring._table = None
        measuring.update(patches)
        assert torch.equal(keeping.centres, measuring.centres)
        assert torch.equal(keeping.squared_radius, measuring.squared_radius)
