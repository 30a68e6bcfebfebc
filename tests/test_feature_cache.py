"""The feature cache: once per image, whatever happens in between; defect 13 of the original."""

import errno
import os
import shutil
import socket
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from captioning.data import images
from captioning.data.images import open_image
from captioning.encoders.base import Encoder, EncoderSpec, find_encoder
from captioning.encoders.feature_store import RECORD, dequantize, name_hash, quantize
from captioning.encoders.features import DeviceFeatures, FeatureRequest, open_features
from captioning.encoders.openvino import openvino_form
from captioning.io import UserError

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


def features(tmp_path, paths, build, means=False, cache="cache", needed=None, views=("whole",)):
    wanted = np.arange(len(paths)) if needed is None else np.array(needed)
    place = cache and tmp_path / cache
    request = FeatureRequest(
        place, SPEC, "0123456789abcdef", build, paths, paths[0].parent, wanted, torch.device("cpu"), means, 2, views
    )
    found = open_features(request)
    return found[0] if views == ("whole",) else found


def rows_of(index, paths):
    """For each row of an index the position of its image."""
    names = [name_hash(path) for path in paths]
    return [names.index(name) if name in names else None for name in np.fromfile(index, RECORD)["name"].tolist()]


def flip_a_bit(data, position):
    raw = bytearray(data.read_bytes())
    raw[position] ^= 1
    data.write_bytes(raw)


def test_features_are_the_same_encoded_cached_copied_or_without_a_cache(tmp_path, paths):
    build = Counting()
    for means, shape in ((False, (2, 49, 6)), (True, (2, 6))):
        first = features(tmp_path, paths, build, means).gather(np.array([4, 1]))
        again = features(tmp_path, paths, build, means).gather(np.array([4, 1]))
        assert build.built == 1 + means and torch.equal(first, again) and first.shape == shape
        plain = features(tmp_path, paths, Counting(), means, cache=None)
        copy = DeviceFeatures(features(tmp_path, paths, build, means), np.array([1, 5, 4]), torch.device("cpu"))
        assert torch.equal(first, plain.gather(np.array([4, 1]))) and torch.equal(first, copy.gather(np.array([4, 1])))


def test_only_what_is_asked_for_is_stored(tmp_path, paths):
    means = features(tmp_path, paths, Counting(), means=True).gather(np.arange(6))
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*.*")) == [
        "whole-means.f16",
        "whole-means.f16.index",
    ]
    grids = features(tmp_path, paths, Counting(), cache="grids").gather(np.arange(6))
    (data,) = (tmp_path / "grids").rglob("*.u8")
    assert data.stat().st_size == 6 * 49 * (6 + 4)
    torch.testing.assert_close(means, grids.mean(1), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [-3.0, 5.0, 5.0], [60000.0, 1.0, -60000.0], [2e-7, 1e-7, 0.0]])
def test_quantization_rounds_to_half_a_step(values):
    grids = np.array([[values]], np.float16)
    found = dequantize(quantize(grids))
    assert np.abs(found - grids.astype(np.float32)).max() <= 0.51 * np.ptp(grids.astype(np.float32)) / 255 + 1e-6


def test_a_changed_image_is_encoded_again_and_only_that(tmp_path, paths):
    build = Counting()
    before = features(tmp_path, paths, build).gather(np.arange(6))
    Image.new("RGB", (40, 30), "red").save(paths[2])
    after = features(tmp_path, paths, build).gather(np.arange(6))
    same = [bool(torch.equal(a, b)) for a, b in zip(before, after, strict=True)]
    assert build.built == 2 and same == [True, True, False, True, True, True]


def test_openvino_gives_pytorchs_features_and_opens_no_socket(monkeypatch):
    """They are float32, and the same bits in batches of any size and from several threads."""
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


def test_only_missing_images_and_views_are_encoded(tmp_path, paths):
    build = Counting()
    features(tmp_path, paths, build, needed=[1, 3])
    index = next((tmp_path / "cache").rglob("whole-grids.u8.index"))
    assert rows_of(index, paths) == [1, 3]
    whole, mirror = features(tmp_path, paths, build, views=("whole", "mirror"))
    assert build.built == 2 and rows_of(index, paths) == [1, 3, 0, 2, 4, 5]
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
    (index,) = (tmp_path / "cache").rglob("*.index")
    assert build.built == 1
    flip_a_bit(paths[3], -1)  # of the same length
    features(tmp_path, paths, build)
    assert build.built == 2 and rows_of(index, paths)[6:] == [3]


@pytest.mark.parametrize("index_bytes, rows", [(-20, 6), (-20, 5.5), (None, 2.5), (0, 6), (None, 0)])
def test_killed_encoding_goes_on_where_it_was(tmp_path, paths, index_bytes, rows):
    """The last record or row is incomplete; a record without its row is ignored."""
    build = Counting()
    whole = features(tmp_path, paths, build).gather(np.arange(6))
    (data,), (index,) = ((tmp_path / "cache").rglob(name) for name in ("*.u8", "*.index"))
    data.write_bytes(data.read_bytes()[: int(rows * len(whole[0]) * 10)])
    index.write_bytes(index.read_bytes()[:index_bytes])
    assert torch.equal(features(tmp_path, paths, build).gather(np.arange(6)), whole)
    assert build.built == 2 and rows_of(index, paths) == list(range(6))


def test_a_damaged_row_is_found_and_encoded_again_beside_what_another_run_added(tmp_path, paths):
    build = Counting()
    first = features(tmp_path, paths, build, needed=[0, 1, 2])
    (data,), (index,) = ((tmp_path / "cache").rglob(name) for name in ("*.u8", "*.index"))
    flip_a_bit(data, 5)
    whole = features(tmp_path, paths, build, needed=[1, 2, 3, 4]).gather(np.arange(1, 5))  # another run
    with pytest.raises(UserError, match=r"0\.png in .*Images.* are damaged"):
        first.gather(np.array([0]))
    again = features(tmp_path, paths, build, needed=range(5)).gather(np.arange(5))
    assert torch.equal(again[1:], whole) and build.built == 3 and rows_of(index, paths) == [None, 1, 2, 3, 4, 0]
    assert torch.equal(again, features(tmp_path, paths, build, cache="other").gather(np.arange(5)))


def test_a_disk_that_is_too_small_is_said_before_encoding(tmp_path, paths, monkeypatch):
    build = Counting()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 6 * 49 * 10))
    with pytest.raises(UserError, match=r"encoding the images needs 3\.1 kB, but .* has 2\.9 kB free"):
        features(tmp_path, paths, build)
    assert build.built == 0


def test_a_run_waits_for_another_that_encodes(tmp_path, paths, capsys):
    features(tmp_path, paths, Counting(), needed=[0])
    (data,) = (tmp_path / "cache").rglob("*.u8")
    with ThreadPoolExecutor(1) as pool:
        with FileLock(data.parent / "lock"):
            waiting = pool.submit(features, tmp_path, paths, Counting())
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
        assert len(waiting.result(timeout=60).gather(np.arange(6))) == 6
    assert "Another run is at work" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_one_of_the_unreadable(tmp_path, paths, monkeypatch):
    plain = type(paths[0]).read_bytes

    def read_bytes(self):
        if self.name == "2.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self)

    monkeypatch.setattr(type(paths[0]), "read_bytes", read_bytes)
    for cache in ("cache", None):
        found = features(tmp_path, paths, Counting(), cache=cache)
        assert found.unreadable == {2: f"{paths[2]}: Permission denied"}
        assert found.gather(np.array([1, 3])).shape == (2, 49, 6)


def test_a_complete_cache_on_a_read_only_disk_serves(tmp_path, paths, monkeypatch):
    whole = features(tmp_path, paths, Counting()).gather(np.arange(6))
    for number, path in enumerate(paths):
        os.utime(path, ns=(number, number))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(paths[0]), "touch", read_only)
    monkeypatch.setattr(os, "fsync", read_only)
    assert torch.equal(features(tmp_path, paths, Counting()).gather(np.arange(6)), whole)
    with pytest.raises(UserError, match="cannot write into .*Read-only"):
        features(tmp_path, paths, Counting(), cache="other")


def test_the_version_of_each_image_is_known(tmp_path, paths):
    found = [features(tmp_path, paths, Counting(), needed=[1, 4], cache=cache) for cache in ("cache", None)]
    for each in found:
        assert each.versions[1].tolist() == [paths[1].stat().st_size, zlib.crc32(paths[1].read_bytes())]
        assert each.versions[0].tolist() == [-1, -1]
