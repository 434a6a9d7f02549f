"""Weight files: every format, what is wrong with them, and where the published ones are looked for."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pydefect.backbones import IMAGENET_WEIGHTS, build_backbone, load_state_dict, weights, weights_fingerprint
from pydefect.errors import InputError, WeightsNotFoundError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return build_backbone("resnet18", "random", seed=7).state_dict()


def write(state: State, path: Path) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    elif path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(OrderedDict(state), path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npz"])
def test_every_format_gives_the_same_network(state, tmp_path, suffix):
    path = write(state, tmp_path / f"weights{suffix}")
    loaded = build_backbone("resnet18", str(path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_parts_that_are_not_built_are_ignored(state, tmp_path):
    """The published file goes on with layer4 and the classifier."""
    more = {**state, "layer4.0.conv1.weight": torch.zeros(512, 256, 3, 3), "fc.bias": torch.zeros(1000)}
    path = write(more, tmp_path / "weights.pth")
    assert weights_fingerprint(build_backbone("resnet18", str(path)).state_dict()) == weights_fingerprint(
        state
    )


def test_step_counters_may_be_missing(state, tmp_path):
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    path = write(old, tmp_path / "weights.safetensors")
    assert weights_fingerprint(build_backbone("resnet18", str(path)).state_dict()) == weights_fingerprint(
        state
    )


def test_wrapped_state_dicts(state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    assert weights_fingerprint(load_state_dict(path)) == weights_fingerprint(state)


def test_half_precision_files(state, tmp_path):
    path = write(
        {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        tmp_path / "half.npz",
    )
    loaded = build_backbone("resnet18", str(path)).conv1.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, state["conv1.weight"].half().float())


def test_a_missing_parameter(state, tmp_path):
    rest = {name: value for name, value in state.items() if not name.startswith("layer3.1")}
    path = write(rest, tmp_path / "weights.npz")
    with pytest.raises(
        InputError,
        match=r"weights.npz'?: not a resnet18 .* 10 parameters are missing, such as 'layer3.1.conv1",
    ):
        build_backbone("resnet18", str(path))


def test_a_misshapen_parameter(state, tmp_path):
    path = write({**state, "layer2.0.bn1.bias": torch.zeros(64)}, tmp_path / "weights.npz")
    with pytest.raises(InputError, match=r"'layer2.0.bn1.bias' has shape \(64,\); resnet18 needs \(128,\)"):
        build_backbone("resnet18", str(path))


def test_another_backbones_weights(state, tmp_path):
    path = write(state, tmp_path / "weights.npz")
    with pytest.raises(InputError, match="not a resnet50"):
        build_backbone("resnet50", str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut off"])
def test_damaged_files(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"weights: .*weights{suffix} cannot be read as a state dict"):
        load_state_dict(path)


def test_a_cut_off_file(state, tmp_path):
    for suffix in (".pth", ".safetensors", ".npz"):
        path = write(state, tmp_path / f"weights{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match="cannot be read as a state dict"):
            load_state_dict(path)


def test_an_unknown_type(tmp_path):
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"'weights.onnx' has type '.onnx'; allowed are .pth, .pt, .safetensors, .npz"
    ):
        load_state_dict(path)


def test_no_such_file(tmp_path):
    with pytest.raises(WeightsNotFoundError, match=r"weights: no file '.*nothing.pth'; give a .pth"):
        build_backbone("resnet18", str(tmp_path / "nothing.pth"))


class Bomb:
    """Unpickling it calls a function of its author's choice."""

    def __reduce__(self):
        return (Path.touch, (Path("pickle-was-run"),))


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_no_code_in_a_file_is_ever_run(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"conv1.weight": Bomb()}, path)
    else:
        np.savez(path, conv1=np.array([Bomb()], dtype=object))
    with pytest.raises(InputError, match="cannot be read as a state dict"):
        load_state_dict(path)
    assert not Path("pickle-was-run").exists()


def test_a_bare_pickle_is_not_run_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in (".pth", ".npz"):
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
        with pytest.raises(InputError, match="cannot be read as a state dict"):
            load_state_dict(path)
    assert not Path("pickle-was-run").exists()


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(InputError, match=r"holds no state dict \(a mapping of names to tensors\)"):
        load_state_dict(path)


def test_an_array_under_the_name_of_an_archive(tmp_path):
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="cannot be read as a state dict"):
        load_state_dict(tmp_path / "array.npz")


def test_words_in_an_archive(tmp_path):
    np.savez(tmp_path / "words.npz", conv1=np.array(["a"]))
    with pytest.raises(InputError, match="cannot be read as a state dict"):
        load_state_dict(tmp_path / "words.npz")


# -- the published files
# -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch hub, and no network."""

    def no_network(url: str, *_: object) -> None:
        raise URLError("no network in this test")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.delenv("PYDEFECT_WEIGHTS_DIR", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path / "torch" / "hub" / "checkpoints"


def published(state: State, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, str]:
    """Let a small file count as the published one; its content and name."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    entry = weights._published("resnet18", hashlib.sha256(content).hexdigest()[:8])
    monkeypatch.setitem(IMAGENET_WEIGHTS, "resnet18", entry)
    return content, entry.filename


def test_the_table_is_torchvisions():
    assert IMAGENET_WEIGHTS["resnet18"].url == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert (
        IMAGENET_WEIGHTS["wide_resnet50_2"].url
        == "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth"
    )


def test_offline_says_which_file_from_where_and_whereto(hub):
    with pytest.raises(WeightsNotFoundError) as caught:
        build_backbone("resnet18", "imagenet", progress=False)
    message = str(caught.value)
    for part in (
        "resnet18-f37072fd.pth",
        "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        str(hub),
        "PYDEFECT_WEIGHTS_DIR",
        "no network in this test",
    ):
        assert part in message
    assert "\n" not in message


def test_a_cached_file_needs_no_network(hub, state, monkeypatch):
    content, filename = published(state, monkeypatch)
    hub.mkdir(parents=True)
    (hub / filename).write_bytes(content)
    network = build_backbone("resnet18", "imagenet", progress=False)
    assert weights_fingerprint(network.state_dict()) == weights_fingerprint(state)


def test_an_offline_folder(hub, state, tmp_path, monkeypatch):
    content, filename = published(state, monkeypatch)
    folder = tmp_path / "offline"
    folder.mkdir()
    (folder / filename).write_bytes(content)
    monkeypatch.setenv("PYDEFECT_WEIGHTS_DIR", str(folder))
    network = build_backbone("resnet18", "imagenet", progress=False)
    assert weights_fingerprint(network.state_dict()) == weights_fingerprint(state)
    assert not hub.exists()


def test_an_offline_file_with_another_digest(hub, state, tmp_path, monkeypatch):
    content, filename = published(state, monkeypatch)
    (tmp_path / filename).write_bytes(content + b"tampered")
    monkeypatch.setenv("PYDEFECT_WEIGHTS_DIR", str(tmp_path))
    digest = hashlib.sha256(content + b"tampered").hexdigest()[:8]
    with pytest.raises(InputError, match=rf"is not the published file: its SHA-256 starts with {digest}"):
        build_backbone("resnet18", "imagenet", progress=False)


def test_a_download_goes_into_the_cache_with_its_digest(hub, state, monkeypatch):
    content, filename = published(state, monkeypatch)
    asked = []

    def download(url: str, target: str, prefix: str, progress: bool) -> None:
        asked.append((url, prefix))
        Path(target).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        build_backbone("resnet18", "imagenet", progress=False)
    entry = IMAGENET_WEIGHTS["resnet18"]
    assert asked == [(entry.url, entry.sha256_prefix)]
    assert (hub / filename).read_bytes() == content


# -- fingerprints
# --------------------------------------------------------------------------------------------------


def test_the_fingerprint_sees_names_shapes_and_values(state):
    original = weights_fingerprint(state)
    assert len(original) == 64
    assert weights_fingerprint(dict(reversed(state.items()))) == original
    assert weights_fingerprint({**state, "bn1.num_batches_tracked": torch.tensor(9)}) == original
    changed = state["conv1.weight"].clone()
    changed[0, 0, 0, 0] = torch.nextafter(changed[0, 0, 0, 0], torch.tensor(9.0))
    assert weights_fingerprint({**state, "conv1.weight": changed}) != original
    assert weights_fingerprint({**state, "conv1.weight": state["conv1.weight"].reshape(64, 147)}) != original
    renamed = {name.replace("bn1", "bn9"): value for name, value in state.items()}
    assert weights_fingerprint(renamed) != original
