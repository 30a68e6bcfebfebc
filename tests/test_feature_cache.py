"""The feature cache: once per image, whatever happens in between; defect 13 of the original."""

import errno
import os
import socket
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from captioning import images, registry
from captioning.encoders import Encoder, EncoderSpec, find_encoder
from captioning.features import DeviceFeatures, FeatureRequest, fits_on, open_features
from captioning.images import open_image
from captioning.io import UserError
from captioning.openvino_form import openvino_form
from captioning.quantization import dequantize, quantize

SPEC = EncoderSpec("toy", 6, (0.0,) * 3, (255.0,) * 3, image_size=28)


class Counting:
    """Builds a toy encoder and counts how often it had to."""

    def __init__(self):
        self.built = 0

    def __call__(self):
        self.built += 1
        torch.manual_seed(0)
        return Encoder(SPEC, [torch.nn.Conv2d(3, 6, 4, 4)])


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "Images"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def features(tmp_path, paths, build, means=False, cache="cache", needed=None, views=("whole",), **more):
    places = [] if cache is None else [tmp_path / part for part in cache.split()]
    wanted = np.arange(len(paths)) if needed is None else np.array(needed)
    request = FeatureRequest(
        places,
        SPEC,
        "0123456789abcdef",
        build,
        paths,
        paths[0].parent,
        wanted,
        torch.device("cpu"),
        means,
        2,
        views,
        **more,
    )
    found = open_features(request)
    return found[0] if views == ("whole",) else found


def test_an_image_is_encoded_once(tmp_path, paths):
    build = Counting()
    first = features(tmp_path, paths, build).gather(np.array([4, 1]))
    again = features(tmp_path, paths, build).gather(np.array([4, 1]))
    assert build.built == 1 and torch.equal(first, again) and first.shape == (2, 49, 6)
    plain = features(tmp_path, paths, build, cache=None).gather(np.array([4, 1]))
    torch.testing.assert_close(first, plain, atol=1e-3, rtol=1e-3)


def test_means_come_from_grids_or_alone_and_are_the_same(tmp_path, paths):
    build = Counting()
    everything = np.arange(6)
    features(tmp_path, paths, build)
    derived = features(tmp_path, paths, build, means=True).gather(everything)
    assert build.built == 1
    alone = features(tmp_path, paths, build, means=True, cache="other").gather(everything)
    assert torch.equal(derived, alone) and derived.shape == (6, 6)
    assert not list((tmp_path / "other").rglob("grid.*"))


def test_int8_takes_half_the_bytes_and_is_derived_from_float16(tmp_path, paths):
    build = Counting()
    exact = features(tmp_path, paths, build).gather(np.arange(6))
    derived = features(tmp_path, paths, build, feature_type="int8").gather(np.arange(6))
    assert build.built == 1
    alone = features(tmp_path, paths, build, cache="other", feature_type="int8")
    assert torch.equal(alone.gather(np.arange(6)), derived) and not list((tmp_path / "other").rglob("*.f16"))
    (data,) = (tmp_path / "cache").rglob("grid.000.f16")
    damaged = bytearray(data.read_bytes())
    damaged[4] ^= 64
    data.write_bytes(damaged)
    for index in (tmp_path / "cache").rglob("grid8.jsonl"):
        index.unlink()
    assert torch.equal(features(tmp_path, paths, build, feature_type="int8").gather(np.arange(6)), derived)
    data.write_bytes(bytes(damaged[:4]) + bytes([damaged[4] ^ 64]) + bytes(damaged[5:]))
    span = exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)
    assert ((derived - exact).abs() <= span / 255 * 0.51 + 2e-3).all() and not torch.equal(derived, exact)
    copy = DeviceFeatures(alone, np.array([5, 0, 3]), torch.device("cpu"))
    assert torch.equal(copy.gather(np.array([3, 5])), derived[[3, 5]])
    means = features(tmp_path, paths, build, means=True, feature_type="int8").gather(np.arange(6))
    torch.testing.assert_close(means, exact.mean(1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [-3.0, 5.0, 5.0], [60000.0, 1.0, -60000.0], [2e-7, 1e-7, 0.0]])
def test_quantization_rounds_to_half_a_step(values):
    grids = np.array([[values]], np.float16)
    found = dequantize(torch.from_numpy(quantize(grids))).numpy()
    assert np.abs(found - grids.astype(np.float32)).max() <= 0.51 * np.ptp(grids.astype(np.float32)) / 255 + 1e-6


def test_a_changed_image_is_encoded_again_and_only_that(tmp_path, paths):
    build = Counting()
    before = features(tmp_path, paths, build).gather(np.arange(6))
    Image.new("RGB", (40, 30), "red").save(paths[2])
    after = features(tmp_path, paths, build).gather(np.arange(6))
    same = [bool(torch.equal(a, b)) for a, b in zip(before, after, strict=True)]
    assert build.built == 2 and same == [True, True, False, True, True, True]


def test_openvino_gives_pytorchs_features_and_opens_no_socket(monkeypatch):
    """In float32, and the same to the bit in batches of any size and from several threads."""
    called = []
    monkeypatch.setattr(socket.socket, "connect", lambda *where: called.append(where))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where: called.append(where))
    spec = find_encoder("efficientnet_lite0")
    encoder = spec.build(spec.find_weights()[0])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        plain = encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    encode = openvino_form(encoder, 224, streams=2)
    assert encode is not None
    with ThreadPoolExecutor(2) as pool:
        together, alone = pool.map(encode, [pixels, pixels[1:2]])
    assert torch.equal(together[1:2], alone)
    assert (together - plain).norm() < 1e-4 * plain.norm()
    assert not called


class Odd(torch.nn.Module):
    """Gives in a traced graph something else than outside of it."""

    def forward(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels, 4) * (2 if torch.jit.is_tracing() else 1)


def test_where_openvino_cannot_run_a_network_pytorch_does(tmp_path, paths, capsys, monkeypatch):
    assert openvino_form(Encoder(SPEC, [Odd()]), 28, 1) is None
    assert "its features differ from PyTorch's" in capsys.readouterr().out
    plain = features(tmp_path, paths, Counting()).gather(np.arange(6))
    monkeypatch.setitem(sys.modules, "openvino", None)  # not installed
    served = features(tmp_path, paths, Counting(), cache="other").gather(np.arange(6))
    torch.testing.assert_close(served, plain, atol=1e-3, rtol=1e-3)


def test_one_pass_cuts_all_views_from_an_image_that_is_opened_once(tmp_path, paths, monkeypatch):
    opened = []
    monkeypatch.setattr(
        images, "open_image", lambda path, *how, **more: opened.append(path) or open_image(path, *how, **more)
    )
    views = ("whole", "mirror", "bottom_right")
    together = features(tmp_path, paths, Counting(), cache="together", views=views)
    assert sorted(opened) == paths
    for view, found in zip(views, together, strict=True):
        (alone,) = features(tmp_path, paths, Counting(), cache="alone", views=[view])
        assert torch.equal(found.gather(np.arange(6)), alone.gather(np.arange(6)))
    assert not torch.equal(together[0].gather(np.arange(6)), together[1].gather(np.arange(6)))


def test_only_missing_views_are_encoded(tmp_path, paths):
    build = Counting()
    features(tmp_path, paths, build, needed=[0, 1, 2])
    index = next((tmp_path / "cache").rglob("grid.jsonl"))
    before = index.read_text()
    whole, mirror = features(tmp_path, paths, build, views=("whole", "mirror"))
    assert build.built == 2 and index.read_text().startswith(before) and len(index.read_text().splitlines()) == 6
    features(tmp_path, paths, build, views=("mirror", "whole"))
    assert build.built == 2 and len(whole.gather(np.arange(6))) == len(mirror.gather(np.arange(6)))


def test_features_do_not_depend_on_who_shares_the_batch(tmp_path, paths):
    together = features(tmp_path, paths, Counting()).gather(np.arange(6))
    for image in range(6):
        alone = features(tmp_path, paths, Counting(), cache=f"cache{image}", needed=[image])
        assert torch.equal(alone.gather(np.array([image]))[0], together[image])


def test_a_touched_or_copied_image_is_known_by_its_bytes(tmp_path, paths):
    build = Counting()
    before = features(tmp_path, paths, build).gather(np.arange(6))
    for number, path in enumerate(paths):
        os.utime(path, ns=(number, number))
    assert torch.equal(features(tmp_path, paths, build).gather(np.arange(6)), before)
    features(tmp_path, paths, build, means=True)
    assert build.built == 1
    (index,) = (tmp_path / "cache").rglob("grid.jsonl")
    size = index.stat().st_size
    features(tmp_path, paths, build)
    assert index.stat().st_size == size  # the new times were noted once
    raw = bytearray(paths[3].read_bytes())
    raw[-1] ^= 1  # of the same length, and other
    paths[3].write_bytes(raw)
    features(tmp_path, paths, build)
    assert build.built == 2


def test_a_copy_on_the_device_gathers_the_same(tmp_path, paths):
    cached = features(tmp_path, paths, Counting())
    copy = DeviceFeatures(cached, np.array([5, 0, 3]), torch.device("cpu"))
    assert torch.equal(copy.gather(np.array([3, 5])), cached.gather(np.array([3, 5])))


def test_a_torn_index_costs_only_what_it_did_not_name(tmp_path, paths):
    build = Counting()
    whole = features(tmp_path, paths, build).gather(np.arange(6))
    (index,) = (tmp_path / "cache").rglob("grid.jsonl")
    index.write_bytes(index.read_bytes()[:-20])
    assert torch.equal(features(tmp_path, paths, build).gather(np.arange(6)), whole)
    assert build.built == 2 and len(index.read_text().splitlines()) == 6


def test_a_damaged_row_is_found_and_encoded_again(tmp_path, paths):
    build = Counting()
    whole = features(tmp_path, paths, build).gather(np.arange(6))
    (data,) = (tmp_path / "cache").rglob("grid.000.f16")
    raw = bytearray(data.read_bytes())
    raw[3 * 49 * 6 * 2 + 5] ^= 1
    data.write_bytes(raw)
    with pytest.raises(UserError, match=r"3\.png .*damaged"):
        features(tmp_path, paths, build).gather(np.arange(6))
    assert torch.equal(features(tmp_path, paths, build).gather(np.arange(6)), whole)


def test_parts_lie_on_several_disks_and_outlive_a_change_of_disks(tmp_path, paths):
    build = Counting()
    whole = features(tmp_path, paths, Counting()).gather(np.arange(6))
    spread = features(tmp_path, paths, build, cache="one two").gather(np.arange(6))
    assert torch.equal(spread, whole)
    lying = [sorted(file.name for file in (tmp_path / disk).rglob("*.jsonl")) for disk in ("one", "two")]
    assert lying == [["grid.jsonl"], ["grid-p1.jsonl"]]
    assert torch.equal(features(tmp_path, paths, build, cache="two one").gather(np.arange(6)), whole)
    assert build.built == 2  # once for each part, and not again
    means = features(tmp_path, paths, build, means=True, cache="one two").gather(np.arange(6))
    assert build.built == 2 and torch.allclose(means, whole.mean(1), atol=1e-3)
    features(tmp_path, paths, build, cache="one")  # without the second disk its images are encoded again
    assert build.built == 3


def test_a_newer_version_in_another_part_wins(tmp_path, paths):
    features(tmp_path, paths, Counting(), cache="one")
    Image.new("RGB", (40, 30), "red").save(paths[5])
    features(tmp_path, paths, Counting(), cache="two one")
    build = Counting()
    after = features(tmp_path, paths, build, cache="one two").gather(np.array([5]))
    assert build.built == 0
    assert torch.equal(after, features(tmp_path, paths, Counting(), cache="alone").gather(np.array([5])))


def test_only_what_is_needed_is_encoded(tmp_path, paths):
    features(tmp_path, paths, Counting(), needed=[1, 3])
    (index,) = (tmp_path / "cache").rglob("grid.jsonl")
    assert [line.split('"')[1] for line in index.read_text().splitlines()] == ["1.png", "3.png"]


def test_what_another_run_adds_survives_a_damaged_row(tmp_path, paths):
    """16.18: forgetting a row truncated the index without the lock."""
    first = features(tmp_path, paths, Counting(), needed=[0, 1])
    (data,) = (tmp_path / "cache").rglob("grid.000.f16")
    raw = bytearray(data.read_bytes())
    raw[5] ^= 1
    data.write_bytes(raw)
    features(tmp_path, paths, Counting(), needed=[1, 2, 3])  # another run
    with pytest.raises(UserError, match="damaged"):
        first.gather(np.array([0]))
    build = Counting()
    features(tmp_path, paths, build, needed=[1, 2, 3])
    assert build.built == 0


def test_an_image_that_cannot_be_read_is_one_of_the_unreadable(tmp_path, paths, monkeypatch):
    """16.15: one image without read permission, or an I/O error, ended encoding with a traceback."""
    plain = type(paths[0]).read_bytes

    def read_bytes(self):
        if self.name == "2.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self)

    monkeypatch.setattr(type(paths[0]), "read_bytes", read_bytes)
    with pytest.raises(UserError, match="1 of 6 images cannot be read"):
        features(tmp_path, paths, Counting())


def test_a_complete_cache_on_a_read_only_disk_serves(tmp_path, paths, monkeypatch):
    whole = features(tmp_path, paths, Counting()).gather(np.arange(6))
    for number, path in enumerate(paths):
        os.utime(path, ns=(number, number))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(type(paths[0]), "touch", read_only)
    monkeypatch.setattr(os, "fsync", read_only)
    assert torch.equal(features(tmp_path, paths, Counting()).gather(np.arange(6)), whole)
    with pytest.raises(UserError, match="cannot write into .*Read-only"):
        features(tmp_path, paths, Counting(), cache="other")


def test_all_views_together_take_at_most_half_of_the_device(monkeypatch):
    """16.17: half of the free memory was taken for each view."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 1000))
    device = torch.device("cuda")
    assert fits_on(device, 500) and not fits_on(device, 6 * 100)


def test_the_version_of_each_image_is_known(tmp_path, paths):
    found = [features(tmp_path, paths, Counting(), needed=[1, 4], cache=cache) for cache in ("cache", None)]
    for each in found:
        assert each.versions[1].tolist() == [paths[1].stat().st_size, zlib.crc32(paths[1].read_bytes())]
        assert each.versions[0].tolist() == [-1, -1]


def test_the_encoders_say_what_they_are():
    specs = {name: find_encoder(name) for name in registry.ENCODERS}
    said = {name: (spec.network, spec.family, spec.regions, spec.transform) for name, spec in specs.items()}
    assert said == {
        "resnet50": ("resnet50", "resnet", 49, "squash224"),
        "resnet101": ("resnet101", "resnet", 49, "squash224"),
        "resnet152": ("resnet152", "resnet", 49, "squash224"),
        "convnext_base": ("convnext_base", "convnext_base", 49, "squash224"),
        "efficientnet_lite0": ("efficientnet_lite0", "efficientnet_lite0", 49, "squash224"),
        "efficientnet_lite2": ("efficientnet_lite2", "efficientnet_lite2", 64, "squash256"),
    }
    assert all(spec.name == name for name, spec in specs.items())
