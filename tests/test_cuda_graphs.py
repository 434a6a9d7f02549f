"""Functions as CUDA graphs: the same results, on new inputs, and only where a shape comes again."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pydefect
from pydefect import cuda_graphs
from pydefect.cuda_graphs import CapturedCall, ReplayedCalls, ReplayedSteps


def test_on_the_processor_the_function_is_called_as_it_is():
    seen = []
    calls = ReplayedCalls(seen.append, lambda: None)
    images = [torch.full((1,), float(number)) for number in range(6)]
    for image in images:
        calls(image)
    assert all(one is other for one, other in zip(seen, images, strict=True))


def test_another_state_is_captured_anew_and_held_as_long_as_its_graph(monkeypatch):
    class Graph:
        """Goes on with the state that it found, as a graph goes on with its memory."""

        def __init__(self, function, inputs):
            self.state = states[-1]

        def __call__(self, given):
            return self.state

    monkeypatch.setattr(cuda_graphs, "CapturedCall", Graph)
    states = [object()]
    calls = ReplayedCalls(lambda given: states[-1], lambda: states[-1])
    image = SimpleNamespace(is_cuda=True, shape=(1, 3, 8, 8))
    for _ in range(2):
        assert [calls(image) for _ in range(6)] == [states[-1]] * 6
        states.append(object())
    assert calls(image) is states[-1]


def test_a_new_bank_is_another_state(products):
    detector = pydefect.fit(
        products, weights="random", epochs=0, calibration_folds=0, resize=64, device="cpu", progress=False
    )
    before = detector.captured_state()
    assert detector.captured_state() is before
    images = iter(products[:2])
    detector.update(images)
    after = detector.captured_state()
    assert after is not before
    with pytest.raises(pydefect.InputError, match="images: there are none in it"):
        detector.update(images)
    assert detector.captured_state() is after


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

    calls = ReplayedCalls(function, lambda: None)
    for shape in [(5,)] * 6 + [(7,)] + [(5,)] * 3 + [(9, 2)] * 9:
        given = torch.randn(*shape, device="cuda")
        assert torch.equal(calls(given), given.square().cumsum(0))
    # Three calls, three runs before the capture and the capture; later ones are replays.
    assert launches.count((9, 2)) == 7
    assert launches.count((7,)) == 1


@pytest.mark.gpu
def test_a_capture_takes_no_step_of_its_own():
    count = torch.zeros(2, device="cuda")
    step = ReplayedSteps(lambda: count.add_(1), count.device)
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


@pytest.mark.gpu
def test_an_update_between_two_images_is_seen_by_the_next(products, defective):
    def fitted():
        return pydefect.fit(
            products[:3],
            weights="random",
            epochs=0,
            calibration_folds=0,
            resize=64,
            device="cuda",
            progress=False,
        )

    detector, twin = fitted(), fitted()
    scores = []
    for number, image in enumerate(detector.stream([defective[0]] * 12, batch_size=1)):
        scores.append(image.image_score)
        if number == 5:  # a graph has been captured by then
            detector.update(defective[:1])
    twin.update(defective[:1])
    expected = twin.score(defective[:1], batch_size=1).image_scores[0]
    np.testing.assert_allclose(scores[6:], [expected] * 6, rtol=1e-3)
    assert scores[6] < scores[5]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_graphs_of_two_devices_in_one_process():
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        call = CapturedCall(torch.square, [torch.ones(3, device=device)])
        assert call(torch.full((3,), 2.0, device=device)).tolist() == [4.0] * 3
        count = torch.zeros((), device=device)
        step = ReplayedSteps(lambda held=count: held.add_(1), count.device)
        for _ in range(6):
            step()
        assert count.item() == 6
