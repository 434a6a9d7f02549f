"""The dual autoencoder at 256x256: a training step and scoring, against plain PyTorch compositions of them.

Run with ``pytest benchmarks/bench_dual_ae.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread figures.
Weights are random: they change neither the operations nor their time. "plain" is what the paper's equations
are when written with PyTorch's operators: the student three times with all its channels, ``torch.quantile``,
``cosine_similarity``, the modules' pure-PyTorch twins, float32. Losses and maps are compared with it before
anything is timed. The teacher sees the augmented image only, as in a fit, where its maps of the images
themselves are kept.

On a processor pydefect has a Muon and gradients of the PDN of its own. They are timed alone, in groups where
"reference" is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydefect.dual_ae import DualAEConfig, convolution, pdn, reunion
from pydefect.dual_ae.frozen import NormalisedTeacher, arithmetic
from pydefect.dual_ae.muon import Muon
from pydefect.dual_ae.network import DualNetwork
from pydefect.dual_ae.pdn import PDN
from pydefect.dual_ae.scorer import Scorer
from pydefect.dual_ae.trainer import build_network, step_losses
from pydefect.features import Precision, cpu_has_bfloat16
from pydefect.ops import reference

CONTENDERS = ["plain", "pydefect", "pydefect bf16"]


def build(
    additions: str, contender: str, device: str, size: str = "small"
) -> tuple[DualAEConfig, DualNetwork, NormalisedTeacher]:
    precision = "bfloat16" if contender.endswith("bf16") else "float32"
    # Unpadded and at 256 pixels, as EfficientAD.
    config = DualAEConfig(additions=additions, precision=precision, size=size, dropout=0.0, padding=False)
    network = build_network(config, (256, 256), 0).to(device)
    torch.manual_seed(0)
    teacher = NormalisedTeacher(PDN(size).to(device, memory_format=torch.channels_last), precision)
    teacher.set_statistics(torch.zeros(384, device=device), torch.full((384,), 0.05, device=device))
    return config, network, teacher


def images_of(seed: int, batch: int, device: str, size: int = 256) -> Tensor:
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(device)
    return images.contiguous(memory_format=torch.channels_last)


def plain_teacher(teacher: NormalisedTeacher, images: Tensor) -> Tensor:
    with torch.no_grad():
        return (teacher.network(images) - teacher.mean[:, None, None]) / teacher.std[:, None, None]


def plain_losses(
    network: DualNetwork,
    images: Tensor,
    targets: Tensor,
    augmented: Tensor,
    of_augmented: Tensor,
    penalty: Tensor,
) -> Tensor:
    """L_TOTAL as the equations have it; an image at a time in the hard-feature loss."""
    squared = (targets - network.student(images)[:, :384]) ** 2
    hard = torch.stack([one[one >= quantile_of(one)].mean() for one in squared]).mean()
    total = hard + (network.student(penalty)[:, :384] ** 2).mean()
    second = network.student(augmented)[:, 384:]
    outputs, fused = network.reconstruct(augmented)
    for output, one in zip(outputs, fused, strict=True):
        total = total + F.mse_loss(output, of_augmented) + F.mse_loss(one, second)
        if network.fusion is not None:
            total = total + 0.5 * (1 - F.cosine_similarity(one, second, dim=1)).mean()
    return total


def quantile_of(values: Tensor) -> Tensor:
    return torch.quantile(values.flatten(), 0.999)


def use_twins(patch: pytest.MonkeyPatch) -> None:
    for name in ("spatial_reunion", "channel_reunion", "selective_fusion"):
        patch.setattr(reunion, name, getattr(reference, name))
    patch.setattr(convolution, "convolution_tiles", lambda weight: None)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("additions", ["none", "all"])
def bench_step(
    additions: str,
    contender: str,
    device: str,
    measure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, network, teacher = build(additions, contender, device)
    images, augmented, penalty = (images_of(seed, 1, device) for seed in range(3))
    targets = plain_teacher(teacher, images)
    plain = contender == "plain"
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-5, fused=not plain)

    def losses() -> Tensor:
        if plain:
            of_augmented = plain_teacher(teacher, augmented)
            return plain_losses(network, images, targets, augmented, of_augmented, penalty)
        with arithmetic(teacher.precision, images.device):
            return step_losses(network, config, images, targets, augmented, teacher(augmented), penalty).sum()

    def step() -> None:
        optimiser.zero_grad()
        losses().backward()
        optimiser.step()

    with torch.no_grad():
        expected = plain_losses(
            network, images, targets, augmented, plain_teacher(teacher, augmented), penalty
        )
        assert abs(losses() / expected - 1) < (0.02 if contender.endswith("bf16") else 1e-4)
    if plain:
        use_twins(monkeypatch)
    measure(f"dual_ae step {additions}", step)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("additions", ["none", "all"])
def bench_score(
    additions: str,
    batch: int,
    contender: str,
    device: str,
    measure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, network, teacher = build(additions, contender, device)
    network.eval()
    images = images_of(0, batch, device)

    @torch.inference_mode()
    def plainly() -> list[Tensor]:
        described = network.student(images)
        differences = [plain_teacher(teacher, images) - described[:, :384]]
        differences += [one - described[:, 384:] for one in network.reconstruct(images)[1]]
        return [one.square().mean(1) for one in differences]

    scorer = Scorer(network, teacher)
    bound = 0.02 if contender.endswith("bf16") else 1e-4
    for found, expected in zip(scorer(images), plainly(), strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < bound
    if contender == "plain":
        use_twins(monkeypatch)
    measure(
        f"dual_ae score {additions} batch {batch}",
        plainly if contender == "plain" else partial(scorer, images),
    )


def muon_of(contender: str, matrix: nn.Parameter) -> torch.optim.Optimizer:
    rate, decay = 1e-3, 0.5
    if contender == "reference":
        return torch.optim.Muon([matrix], lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return Muon([matrix], rate, decay)


def moved(contender: str, start: Tensor, gradient: Tensor) -> Tensor:
    matrix = nn.Parameter(start.clone())
    matrix.grad = gradient
    muon_of(contender, matrix).step()
    return matrix.detach() - start


@pytest.mark.parametrize("contender", ["pydefect", "reference"])
# The last convolution of the student and one of an autoencoder's.
@pytest.mark.parametrize(("rows", "columns"), [(768, 4096), (64, 1024)])
def bench_muon(rows: int, columns: int, contender: str, device: str, measure: Callable[..., None]) -> None:
    if device != "cpu":
        pytest.skip("a card takes PyTorch's own")
    if contender == "reference" and rows > 64 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("PyTorch's takes minutes without AVX-512")
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    some = start[:256, :1024], gradient[:256, :1024]
    expected = moved("reference", *some)
    difference = moved(contender, *some) - expected
    # PyTorch's products are bfloat16, ours may be. Both were up to 0.03 off in the tests on such matrices.
    assert float(difference.norm() / expected.norm()) < 0.06
    matrix = nn.Parameter(start)
    matrix.grad = gradient
    measure(f"dual_ae muon {rows}x{columns}", muon_of(contender, matrix).step)


@pytest.mark.parametrize("contender", ["pydefect", "reference"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def bench_pdn(
    precision: Precision,
    contender: str,
    device: str,
    measure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device != "cpu":
        pytest.skip("a card takes PyTorch's own")
    if precision == "bfloat16" and not cpu_has_bfloat16():
        pytest.skip("no instructions for bfloat16 here")
    torch.manual_seed(0)
    network = PDN(padding=True).to(memory_format=torch.channels_last)
    monkeypatch.setattr(pdn, "TrainedConvolution", nn.Conv2d)
    monkeypatch.setattr(pdn, "_Pooling", nn.AvgPool2d)
    # Its layers one after the other.
    twin = nn.Sequential(*PDN(padding=True)).to(memory_format=torch.channels_last)
    twin.load_state_dict(network.state_dict())
    # As many as a step has of one image: itself, augmented, and one for the penalty.
    images = images_of(0, 3, device, 128)
    along = torch.randn_like(twin(images).detach())

    def step(network: nn.Module) -> tuple[Tensor, ...]:
        with arithmetic(precision, images.device):
            described = network(images)
        gradients = torch.autograd.grad(described, list(network.parameters()), along.to(described.dtype))
        return described.detach(), *gradients

    # In float32 an activation beside zero may be on the other side of it: a thousandth of a gradient.
    bound = 0.02 if precision == "bfloat16" else 0.01
    timed = network if contender == "pydefect" else twin
    for found, expected in zip(step(timed), step(twin), strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < bound
    measure(f"dual_ae pdn {precision} 3x3x128x128 forward+backward", partial(step, timed))
