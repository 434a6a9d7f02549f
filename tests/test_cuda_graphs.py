"""Functions as CUDA graphs: the same results, on new inputs, and only where a shape comes again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pydefect
from pydefect.cuda_graphs import CapturedCall, ReplayedCalls, ReplayedSteps


def test_on_the_processor_the_function_is_called_as_it_is():
    seen = []
    calls = ReplayedCalls(seen.append)
    images = [torch.full((1,), float(number)) for number in range(6)]
    for image in images:
        calls(image)
    assert all(one is other for one, other in zip(seen, images, strict=True))


@pytest.mark.gpu
def test_a_captured_call_runs_on_new_inputs():
    def function(first, second):
        return {"sum": first + second, "product": first * second}

    first, second = (torch.randn(40, 3, device="cuda") for _ in range(2))
    call = CapturedCall(function, [first, second])
    first, second = (torch.randn(40, 3, device="cuda") for _ in range(2))
    found = call(first, second)
    for name, expected in function(first, second).items():
        assert torch.equal(found[name], expected)


@pytest.mark.gpu
def test_a_shape_that_comes_again_is_captured():
    launches = []

    def function(given):
        launches.append(given.shape)
        return given.square().cumsum(0)

    calls = ReplayedCalls(function)
    for shape in [(5,)] * 6 + [(7,)] + [(5,)] * 3 + [(9, 2)] * 9:
        given = torch.randn(*shape, device="cuda")
        assert torch.equal(calls(given), given.square().cumsum(0))
    # Three calls, three runs before the capture and the capture; later ones are replays.
    assert launches.count((9, 2)) == 7
    assert launches.count((7,)) == 1


@pytest.mark.gpu
def test_a_capture_takes_no_step_of_its_own():
    count = torch.zeros(2, device="cuda")
    step = ReplayedSteps(lambda: count.add_(1))
    for expected in range(1, 8):
        step()
        assert count.tolist() == [expected] * 2


@pytest.mark.gpu
def test_images_that_come_one_by_one_get_the_scores_of_a_batch(products, defective):
    detector = pydefect.fit(
        products, weights="random", epochs=0, calibration_folds=0, resize=64, device="cuda", progress=False
    )
    images = [*products, *defective]
    single, batch = (pydefect.score(detector, images, batch_size=size) for size in (1, len(images)))
    # cuDNN may choose another convolution for another batch.
    np.testing.assert_allclose(single.image_scores, batch.image_scores, rtol=2e-2, atol=1e-3)
    for one, other in zip(single.anomaly_maps, batch.anomaly_maps, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=1e-2)
