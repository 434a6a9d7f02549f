"""Times anomalib's models on the task that end_to_end.py gives; runs in the peers' environment.

    PYTHONPATH=benchmarks PEERS/bin/python benchmarks/peers/time_anomalib.py task.pt times.json

The task holds the images as network input, the backbone's weights and what is to be timed. Nothing is
downloaded: the models are built without weights and take the task's. Banks have the sizes that a fit on all
training images gives; scoring takes the same time whichever patches are in them, so PatchCore's are drawn at
random instead of by its coreset search.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peak_memory import peak_mib
from torch import Tensor, nn


def import_torchvision() -> Any:
    """Where PyPI's torchvision (for CUDA) meets PyTorch for the CPU, its operators are missing at import."""
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # what it defines lives as long as it does
        import torchvision
    return torchvision


def load_backbone(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the network the shared weights; layer4 and the classifier, which nobody reads, keep their own."""
    missing = network.load_state_dict(weights, strict=False)
    wrong = [
        name
        for name in missing.missing_keys
        if not name.startswith(("layer4", "fc")) and not name.endswith("num_batches_tracked")
    ]
    if wrong:
        raise ValueError(f"weights: {wrong[0]} is missing")


def build_cfa(task: dict[str, Any]) -> nn.Module:
    """CFA with a bank of as many centres as the input has patches, all of them as default."""
    from anomalib.models.image.cfa.torch_model import CfaModel

    model = CfaModel(task["backbone"], 1, 1, 3, 3, 1e-5)
    load_backbone(model.feature_extractor, task["weights"])
    with torch.no_grad():
        model.initialize_centroid([SimpleNamespace(image=batch) for batch in task["train"].split(4)])
    return model.eval()


def build_patchcore(task: dict[str, Any]) -> nn.Module:
    """PatchCore with 10 % of all training patches, layers 2 and 3, 9 neighbours, as default."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(["layer2", "layer3"], task["backbone"], pre_trained=False)
    load_backbone(model.feature_extractor.feature_extractor, task["weights"])
    model.train()
    with torch.inference_mode():
        for batch in task["train"].split(4):
            model(batch)
    patches = torch.vstack(model.embedding_store)
    model.embedding_store.clear()
    wanted = len(patches) // len(task["train"]) * task["train_images"] // 10
    if wanted > len(patches):
        raise ValueError("train: too few images for the bank of all of them")
    model.memory_bank = patches[
        torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:wanted]
    ]
    return model.eval()


def build_efficientad(task: dict[str, Any]) -> nn.Module:
    """EfficientAD-S as initialised: it has networks of its own."""
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

    return EfficientAdModel(384, EfficientAdModelSize.S).eval()


MODELS = {"CFA": build_cfa, "PatchCore": build_patchcore, "EfficientAD-S": build_efficientad}


def times_of(call: Callable[[], Any], rounds: int) -> list[float]:
    """Return the seconds of every round, after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def training_step(task: dict[str, Any]) -> Callable[[], None]:
    """One step of CFA: its loss, its optimiser, 4 images."""
    from anomalib.models.image.cfa.loss import CfaLoss

    model = build_cfa(task).train()
    loss = CfaLoss(3, 3, 1e-5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-4, amsgrad=True)
    images = task["train"][:4]

    def step() -> None:
        optimiser.zero_grad()
        # As anomalib does: the radius is part of one graph for all steps.
        loss(model(images)).backward(retain_graph=True)
        optimiser.step()

    return step


def measure_aupro(task: dict[str, Any]) -> dict[str, Any]:
    """AUPRO of maps and masks in memory: one run, which takes long, and its peak memory."""
    from anomalib.metrics.aupro import _AUPRO

    masks = task["masks"].long()
    times, areas = [], []

    def measure() -> None:
        metric = _AUPRO(fpr_limit=0.3)
        began = time.perf_counter()
        metric.update(task["maps"], masks)
        areas.append(float(metric.compute()))
        times.append(time.perf_counter() - began)

    peak = peak_mib(measure)
    return {"times": {"aupro": times}, "peak_mib": {"aupro": peak}, "found": {"aupro": areas[-1]}}


def efficientad_step(task: dict[str, Any]) -> Callable[[], None]:
    """One step of EfficientAD-S: its losses, its optimiser, one image and one penalty image."""
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

    model = EfficientAdModel(384, EfficientAdModelSize.S).train()
    trained = [*model.student.parameters(), *model.ae.parameters()]
    optimiser = torch.optim.Adam(trained, lr=1e-4, weight_decay=1e-5)
    image, penalty = task["train"][:1], task["train"][1:2]

    def step() -> None:
        optimiser.zero_grad()
        sum(model(image, penalty)).backward()
        optimiser.step()

    return step


STEPS = {"fit": training_step, "efficientad step": efficientad_step}


def main() -> None:
    """Run the task."""
    task = torch.load(sys.argv[1], weights_only=True)
    torch.set_num_threads(task["threads"])
    torchvision = import_torchvision()
    # Without this, CFA would download its weights.
    torchvision.models.get_model_weights = lambda name: SimpleNamespace(DEFAULT=None)
    from importlib.metadata import version

    found: dict[str, Any] = {"versions": {"anomalib": version("anomalib")}, "times": {}, "peak_mib": {}}
    if task["what"] == "score":
        for name in task.get("models", MODELS):
            model = MODELS[name](task)
            found["peak_mib"][name] = {}
            with torch.inference_mode():
                found["times"][name] = {}
                for batch in task["batches"]:
                    images = task["images"][:batch]
                    call = partial(model, images)
                    found["peak_mib"][name][str(batch)] = peak_mib(call)
                    found["times"][name][str(batch)] = times_of(call, task["rounds"])
    elif task["what"] == "metrics":
        found |= measure_aupro(task)
    else:
        found["times"]["step"] = times_of(STEPS[task["what"]](task), task["rounds"])
    with open(sys.argv[2], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
