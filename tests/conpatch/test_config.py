"""Settings: what is refused and with which words, presets, JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pydefect.conpatch import PRESETS, ConPatchConfig
from pydefect.errors import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "vgg16"}, "backbone: 'vgg16' is not known; allowed are resnet18, "),
        ({"backbone": ["resnet18"]}, r"backbone: \['resnet18'\] is not known; allowed are resnet18, "),
        (
            {"resize": 8},
            r"resize: 8 given; allowed are a side or \(height, width\) of 16 pixels or more, or None",
        ),
        ({"resize": (64,)}, r"resize: \(64,\) given; allowed are a side"),
        ({"resize": (64, 32.5)}, r"resize: \(64, 32.5\) given; allowed are a side"),
        ({"crop": "224"}, "crop: '224' given; allowed are a side"),
        ({"crop": True}, "crop: True given; allowed are a side"),
        ({"region": (0, 0, 64)}, r"region: \(0, 0, 64\) given; allowed are \(top, left, bottom, right\)"),
        ({"ignore": [(0, 0, 64)]}, r"ignore\[0\]: \(0, 0, 64\) given; allowed are"),
        ({"levels": ()}, r"levels: \(\) given; allowed are ascending choices out of 1, 2, 3"),
        ({"levels": (3, 1)}, r"levels: \(3, 1\) given; allowed are ascending"),
        ({"levels": 2}, "levels: 2 given; allowed are ascending"),
        (
            {"level_weights": (1.0, 1.0)},
            r"level_weights: 2 given for levels \(1, 2, 3\); one a level is needed",
        ),
        (
            {"level_weights": (1, -1, 1)},
            r"level_weights: \(1, -1, 1\) given; allowed are one number >= 0 a level",
        ),
        (
            {"level_weights": (1, float("nan"), 1)},
            "level_weights: .* given; allowed are one number >= 0 a level",
        ),
        ({"level_weights": "abc"}, "level_weights: 'abc' given; allowed are one number"),
        ({"level_weights": 2.0}, "level_weights: 2.0 given; allowed are one number"),
        ({"level_balance": "max"}, "level_balance: 'max' given; allowed are 'none', 'std'"),
        (
            {"initialisation": "random"},
            "initialisation: 'random' given; allowed are 'default', 'identity', 'pca'",
        ),
        (
            {"bank": "coreset"},
            "bank: 'coreset' given; allowed are 'ema', 'position_mean', 'kmeans', 'kcenter'",
        ),
        ({"rebuild_bank": True}, "rebuild_bank: True given; allowed are 'never', 'epoch', 'end'"),
        ({"losses": None}, "losses: None given; allowed are 'none', 'contrastive', 'hypersphere', 'both'"),
        ({"similarity_power": 3}, "similarity_power: 3 given; allowed are 1, 2"),
        ({"similarity_power": 2.0}, "similarity_power: 2.0 given; allowed are 1, 2"),
        ({"similarity_power": True}, "similarity_power: True given; allowed are 1, 2"),
        ({"pair_source": "online"}, "pair_source: 'online' given; allowed are 'target', 'cross'"),
        ({"reduction": "sum"}, "reduction: 'sum' given; allowed are 'paper', 'mean'"),
        ({"distance_power": 0}, "distance_power: 0 given; allowed are 1, 2"),
        ({"score": "eq9"}, "score: 'eq9' given; allowed are 'certainty', 'nearest'"),
        (
            {"backbone_precision": "float16"},
            "backbone_precision: 'float16' given; allowed are 'auto', 'float32', 'bfloat16'",
        ),
        ({"image_score": "mean"}, "image_score: 'mean' given; allowed are 'max_patch', 'max_map'"),
        ({"alpha": 1.1}, "alpha: 1.1 given; allowed are 0 to 1"),
        ({"alpha": "0.5"}, "alpha: '0.5' given; allowed are 0 to 1"),
        ({"alpha": None}, "alpha: None given; allowed are 0 to 1"),
        ({"alpha": float("nan")}, "alpha: nan given; allowed are 0 to 1"),
        ({"sigma": 0}, "sigma: 0 given; allowed are 1e-12 and more"),
        ({"sigma": float("inf")}, "sigma: inf given; allowed are 1e-12 and more"),
        ({"gamma": 0.5}, "gamma: 0.5 given; allowed are 1 and more"),
        ({"max_bank_size": 0}, "max_bank_size: 0 given; allowed are 1 and more"),
        ({"margin": -0.1}, "margin: -0.1 given; allowed are 0 and more"),
        ({"bank_momentum": 2}, "bank_momentum: 2 given; allowed are 0 to 1"),
        ({"target_momentum": -1}, "target_momentum: -1 given; allowed are 0 to 1"),
        ({"epochs": 1.5}, "epochs: 1.5 given; allowed are whole numbers"),
        ({"epochs": True}, "epochs: True given; allowed are whole numbers"),
        ({"epochs": -1}, "epochs: -1 given; allowed are 0 and more"),
        ({"epochs": None}, "epochs: None given; allowed are 0 and more"),
        ({"batch_size": 0}, "batch_size: 0 given; allowed are 1 and more"),
        ({"neighbors": 0}, "neighbors: 0 given; allowed are 1 and more"),
        ({"representation_dim": 0}, "representation_dim: 0 given; allowed are 1 and more"),
        ({"projection_dim": 2.5}, "projection_dim: 2.5 given; allowed are whole numbers"),
        ({"contrastive_patches": 1}, "contrastive_patches: 1 given; allowed are 2 and more"),
        ({"learning_rate": float("inf")}, "learning_rate: inf given; allowed are 0 and more"),
        ({"early_stopping": "no"}, "early_stopping: 'no' given; allowed are True, False"),
        (
            {"calibration_folds": 1},
            r"calibration_folds: 1 given; allowed are 0 \(no threshold\) and 2 or more",
        ),
        ({"false_alarm_rate": 5}, "false_alarm_rate: 5 given; allowed are 0 to 1"),
        ({"cache_memory_mb": -1}, "cache_memory_mb: -1 given; allowed are 0 and more"),
    ],
)
def test_what_is_refused(settings, message):
    settings = {"levels": (1, 2, 3), **settings}
    with pytest.raises(InputError, match=f"^{message}"):
        ConPatchConfig(**settings)


def test_every_number_has_a_range():
    """A setting added without a check would fail somewhere in the training instead."""
    for field in dataclasses.fields(ConPatchConfig):
        if field.name in ("level_weights",):
            continue
        with pytest.raises(InputError, match=f"^{field.name}: "):
            ConPatchConfig(**{field.name: object()})


def test_unknown_presets_and_settings():
    with pytest.raises(InputError, match="preset: 'best' is not known; allowed are default, paper"):
        ConPatchConfig.from_preset("best")
    with pytest.raises(InputError, match=r"epoch: not a setting of ConPatch; allowed are alpha, .*epochs, "):
        ConPatchConfig.from_preset("default", epoch=3)


def test_the_paper_preset_is_the_printed_method():
    """Sections 3 and 4.1 of the paper; whatever the defaults become, this stays."""
    config = ConPatchConfig.from_preset("paper")
    printed = {
        "resize": (256, 256),
        "crop": (224, 224),
        "levels": (1, 2, 3),
        "level_balance": "none",
        "level_weights": None,
        "coordinate_weight": 1.0,
        "representation_dim": 448,
        "projection_dim": None,
        "initialisation": "default",
        "bank": "ema",
        "gamma": 4.0,
        "max_bank_size": None,
        "bank_momentum": 0.1,
        "rebuild_bank": "never",
        "losses": "both",
        "alpha": 0.8,
        "sigma": 4.0,
        "similarity_power": 1,
        "pair_source": "target",
        "margin": 0.2,
        "reduction": "paper",
        "contrastive_patches": None,
        "target_momentum": 0.4,
        "phi": 0.6,
        "neighbors": 3,
        "radius": 1e-5,
        "distance_power": 1,
        "epochs": 30,
        "early_stopping": False,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "weight_decay": 5e-4,
        "score": "certainty",
        "image_score": "max_patch",
        "smoothing": 4.0,
        "calibration_folds": 0,
    }
    assert {name: getattr(config, name) for name in printed} == printed


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_change_a_preset(preset):
    changed = ConPatchConfig.from_preset(preset, alpha=0.25, epochs=7)
    expected = dataclasses.replace(ConPatchConfig.from_preset(preset), alpha=0.25, epochs=7)
    assert changed == expected


def test_fewer_levels_keep_the_weights_of_the_rest():
    preset = ConPatchConfig.from_preset("default")
    assert preset.level_weights is not None
    fewer = ConPatchConfig.from_preset("default", levels=(2, 3))
    assert fewer.level_weights == preset.level_weights[1:]
    assert ConPatchConfig.from_preset("paper", levels=(2, 3)).level_weights is None


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset):
    config = ConPatchConfig.from_preset(
        preset,
        resize=(64, 96),
        crop=None,
        region=[[8, 0], [90, 70], [90, 0]],
        ignore=[(20, 0, 30, 40)],
        levels=[2, 3],
    )
    assert ConPatchConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_nothing_to_ignore_is_no_setting():
    # Files of versions that did not know it have none, and are those of the same run.
    for nothing in (None, (), []):
        assert ConPatchConfig(ignore=nothing).to_dict()["ignore"] is None


def test_sizes_and_numbers_as_people_write_them():
    config = ConPatchConfig(resize=[64, 96], crop=48, epochs=np.int64(3), alpha=np.float32(0.5))
    assert (config.resize, config.crop) == ((64, 96), (48, 48))
    assert type(config.epochs) is int
    assert type(config.alpha) is float


def test_equal_numbers_are_one_setting():
    """Files and a benchmark's keys would tell 2 and 2.0 apart."""
    whole, real = ConPatchConfig(gamma=2, smoothing=4), ConPatchConfig(gamma=2.0, smoothing=np.float32(4))
    assert json.dumps(whole.to_dict()) == json.dumps(real.to_dict())
    assert isinstance(whole.gamma, float)
