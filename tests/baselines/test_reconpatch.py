"""ReConPatch: one training step and the twin by hand, and PatchCore on top of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pydefect.baselines import training
from pydefect.baselines.detector import Context
from pydefect.baselines.patchcore import PatchCore, PatchCoreConfig
from pydefect.baselines.reconpatch import ReConPatch, ReConPatchConfig, TwinNetwork
from pydefect.baselines.training import train
from pydefect.errors import PydefectError
from pydefect.features import FeatureCache, patch_vectors
from pydefect.ops import reference
from pydefect.persistence import Checkpoint


def test_the_twin_follows_slowly():
    network = TwinNetwork(4, 3, 2)
    before = network.target_projection.weight.clone()
    with torch.no_grad():
        network.projection.weight += 1
    network.update_target(0.9)
    torch.testing.assert_close(network.target_projection.weight, before + 0.1)
    assert not any(parameter.requires_grad for parameter in network.target_representation.parameters())


def test_training_is_the_plain_loop(cache):
    config = ReConPatchConfig(
        representation_dim=6, projection_dim=5, epochs=2, batch_size=2, learning_rate=1e-2, coreset_ratio=0.2
    )
    context = Context(seed=7)
    model = ReConPatch.fit(cache, [1, 2, 3, 5, 6], config, context)

    torch.manual_seed(7)
    network = TwinNetwork(24, 6, 5).double()
    online = [*network.representation.parameters(), *network.projection.parameters()]
    optimiser = torch.optim.AdamW(online, lr=1e-2, weight_decay=1e-2, amsgrad=True)
    history = []
    for epoch in (1, 2):
        order = torch.randperm(5, generator=context.generator(epoch)).tolist()
        losses = []
        for start in (0, 2, 4):
            chosen = [[1, 2, 3, 5, 6][image] for image in order[start : start + 2]]
            patches = patch_vectors(cache.get(chosen)).flatten(0, 1).double()
            loss = reference.relaxed_contrastive(
                network.projection(network.representation(patches)),
                network.target_projection(network.target_representation(patches)).detach(),
                alpha=0.5,
                sigma=1.0,
                margin=1.0,
                neighbors=5,
                similarity_power=2,
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            network.update_target(0.9)
            losses.append(float(loss.detach()))
        history.append(sum(losses) / 3)
    # Adam divides a gradient by its own size, so that small ones carry their float32 error whole: 1e-3 of a
    # step of 1e-2, and some more in a few steps.
    assert model.found["history"] == pytest.approx(history, rel=1e-3)
    torch.testing.assert_close(
        model.representation.weight.double(), network.representation.weight, rtol=1e-2, atol=1e-3
    )


def test_scoring_is_patchcores_on_the_representation(cache):
    config = ReConPatchConfig(
        representation_dim=6, epochs=0, coreset_ratio=0.2, coreset_projection=None, neighbors=3
    )
    model = ReConPatch.fit(cache, range(5), config, Context())
    represented = FeatureCache()
    for index in range(7):
        f = model.representation(patch_vectors(cache.get([index])))[0]
        represented.append([f.detach().T.reshape(1, 6, 6, 5)])
    same = PatchCoreConfig(levels=(1,), coreset_ratio=0.2, projection_dim=None, neighbors=3)
    patchcore = PatchCore.fit(represented, range(5), same, Context())
    with torch.inference_mode():
        scores, maps = model.score(cache.get([6]), (24, 20))
    expected_scores, expected_maps = patchcore.score(represented.get([6]), (24, 20))
    # float16 in between.
    torch.testing.assert_close(scores, expected_scores, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(maps, expected_maps, rtol=1e-2, atol=1e-3)


def test_a_part_of_the_patches_may_train(cache):
    part = ReConPatchConfig(representation_dim=6, epochs=1, contrastive_patches=10)
    first, second = (ReConPatch.fit(cache, range(5), part, Context(seed=1)) for _ in range(2))
    assert first.found == second.found
    whole = ReConPatch.fit(cache, range(5), ReConPatchConfig(representation_dim=6, epochs=1), Context(seed=1))
    assert first.found != whole.found


@pytest.mark.parametrize("kept", [False, True])
def test_a_loss_that_is_not_finite_ends_the_training(cache, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_INTERVAL", -1.0)
    module = torch.nn.Linear(1, 1)
    with pytest.raises(PydefectError, match="the loss of epoch 1 is not finite; lower learning_rate"):
        train(
            module,
            lambda levels, generator: module.weight.sum() * float("nan"),
            cache,
            range(3),
            ReConPatchConfig(batch_size=1),
            Context(checkpoint=Checkpoint(tmp_path, {"run": 1}) if kept else None),
        )


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_weights_decay_as_the_setting_says(decay: float) -> None:
    cache = FeatureCache()
    cache.append([torch.ones(3, 1, 1, 1)])
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    config = SimpleNamespace(epochs=2, batch_size=1, learning_rate=0.1, weight_decay=decay)

    def nothing(levels, generator):
        return 0 * module.weight.sum() + 0 * module.bias.sum()

    train(module, nothing, cache, range(3), config, Context())
    torch.testing.assert_close(module.weight.detach(), before * (1 - 0.1 * decay) ** 6)


def test_every_step_draws_anew() -> None:
    cache = FeatureCache()
    cache.append([torch.ones(3, 1, 1, 1)])
    module, drawn = torch.nn.Linear(2, 2), []

    def loss(levels, generator):
        drawn.append(int(torch.randint(2**40, (), generator=generator)))
        return module.weight.sum() + module.bias.sum()

    config = SimpleNamespace(epochs=2, batch_size=1, learning_rate=0.1, weight_decay=0.0)
    train(module, loss, cache, range(3), config, Context())
    assert len(set(drawn)) == len(drawn) == 6
