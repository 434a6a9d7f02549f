"""Fits one of anomalib's models on the task that against_anomalib.py gives; runs in the peers' environment.

    PYTHONPATH=benchmarks PEERS/bin/python benchmarks/peers/fit_anomalib.py task.pt scores.pt

The task holds the images as network input, the backbone's weights and the settings. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from time_anomalib import import_torchvision, load_backbone
from torch import Tensor, nn

# Images at a time, but in CFA's training.
BATCH = 8


def fit_padim(task: dict[str, Any]) -> nn.Module:
    """PaDiM on the channels that the task names."""
    from anomalib.models.image.padim.torch_model import PadimModel

    model = PadimModel(task["backbone"], pre_trained=False, n_features=len(task["channels"]))
    load_backbone(model.feature_extractor.feature_extractor, task["weights"])
    model.idx = task["channels"]
    model.train()
    model.feature_extractor.eval()
    for batch in task["train"].split(BATCH):
        model(batch)
    model.fit()
    return model


def fit_patchcore(task: dict[str, Any]) -> nn.Module:
    """PatchCore with its own coreset."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(["layer2", "layer3"], task["backbone"], pre_trained=False)
    load_backbone(model.feature_extractor.feature_extractor, task["weights"])
    model.train()
    model.feature_extractor.eval()
    with torch.inference_mode():
        for batch in task["train"].split(BATCH):
            model(batch)
        model.subsample_embedding(task["coreset_ratio"])
    return model


def fit_cfa(task: dict[str, Any]) -> nn.Module:
    """CFA trained for the task's epochs, as its Lightning module does."""
    from anomalib.models.image.cfa.loss import CfaLoss
    from anomalib.models.image.cfa.torch_model import CfaModel

    model = CfaModel(task["backbone"], 1, 1, 3, 3, 1e-5)
    load_backbone(model.feature_extractor, task["weights"])
    model.initialize_centroid([SimpleNamespace(image=batch) for batch in task["train"].split(4)])
    loss = CfaLoss(3, 3, 1e-5)
    optimiser = torch.optim.AdamW(model.descriptor.parameters(), lr=1e-3, weight_decay=5e-4, amsgrad=True)
    model.train()
    for epoch in range(task["epochs"]):
        order = torch.randperm(len(task["train"]))
        for chosen in order.split(4):
            optimiser.zero_grad()
            # As anomalib does: the radius is part of one graph for all steps.
            loss(model(task["train"][chosen])).backward(retain_graph=True)
            optimiser.step()
        print(f"epoch {epoch + 1}", file=sys.stderr)
    return model


MODELS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "padim": fit_padim,
    "patchcore": fit_patchcore,
    "cfa": fit_cfa,
}


@torch.inference_mode()
def scores_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Image scores [N] and maps [N, H, W] of a model."""
    model.eval()
    found = [model(batch) for batch in images.split(BATCH)]
    maps = torch.cat([batch.anomaly_map for batch in found])
    return torch.cat([batch.pred_score.flatten() for batch in found]), maps.reshape(
        len(images), *maps.shape[-2:]
    )


def main() -> None:
    """Run the task."""
    task = torch.load(sys.argv[1], weights_only=True)
    torch.set_num_threads(task["threads"])
    torchvision = import_torchvision()
    # Without this, CFA would download its weights.
    torchvision.models.get_model_weights = lambda name: SimpleNamespace(DEFAULT=None)
    torch.manual_seed(task["seed"])
    scores, maps = scores_of(MODELS[task["method"]](task), task["test"])
    torch.save({"scores": scores, "maps": maps}, sys.argv[2])


if __name__ == "__main__":
    main()
