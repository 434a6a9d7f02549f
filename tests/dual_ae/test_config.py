"""Settings: checks, presets, JSON."""

from __future__ import annotations

import typing

import pytest

from pydefect.dual_ae.config import ADDITIONS, DualAEConfig, EfficientADConfig
from pydefect.errors import InputError


def test_defaults_and_presets():
    assert DualAEConfig.from_preset("default") == DualAEConfig()
    paper = DualAEConfig.from_preset("paper")
    assert (paper.steps, paper.context_normalisation, paper.batch_size) == (70_000, "none", 1)
    assert [paper.rate(step) for step in (0, 66_499, 66_500)] == pytest.approx([1e-4, 1e-4, 1e-5])
    assert EfficientADConfig().additions == "none"
    hint = typing.get_type_hints(DualAEConfig)["additions"]
    assert set(typing.get_args(hint)) == set(ADDITIONS)


@pytest.mark.parametrize("settings", [{}, {"resize": (128, 64), "additions": "cosine", "penalty": "none"}])
def test_settings_go_through_json(settings):
    config = DualAEConfig(**settings)
    assert DualAEConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("additions", "some"),
        ("size", "large"),
        ("context_normalisation", "sum"),
        ("hard_quantile", 1.1),
        ("dropout", 1.0),
        ("steps", 0),
        ("batch_size", 1.5),
        ("held_out_share", 0.7),
        ("learning_rate", -1),
        ("penalty", 3),
        ("teacher", None),
        ("resize", 32),
        ("crop", (64, 40)),
        ("region", (0, 0, 0, 5)),
        ("padding", 1),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(InputError, match=name):
        DualAEConfig(**{name: value})


def test_efficientad_has_no_additions():
    assert EfficientADConfig().additions == "none"
    with pytest.raises(InputError, match="additions: 'all' given; EfficientAD allows 'none'"):
        EfficientADConfig(additions="all")


def test_quantiles_in_the_wrong_order_are_refused():
    with pytest.raises(InputError, match="low_quantile"):
        DualAEConfig(low_quantile=0.9, high_quantile=0.8)
