"""Each decoder, on an encoder that is frozen and one whose last stage was trained: PyTorch and ONNX Runtime say the same."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fuzz_targets import sound_checkpoint
from tiny_encoder import SPEC, in_place_of_resnet50

from captioning.captioner import Captioned, Captioner
from captioning.config import registry
from captioning.data.dataset import EOS
from captioning.decoders.base import build_decoder, find_decoder, group_sizes
from captioning.modes import export as export_model
from captioning.runs.checkpoints import load_checkpoint, save_checkpoint

DOG = 5  # in the checkpoint's vocabulary


class Pair(NamedTuple):
    """The same weights, run by PyTorch and by ONNX Runtime."""

    name: str
    by_pytorch: Captioner
    by_onnxruntime: Captioner


def head_for_dogs() -> dict:
    """A regression that expects the word "dog" of every image, and leaves the beam no say."""
    project, expect = np.zeros((5, 1), np.float32), np.zeros((1, 2), np.int8)
    project[-1] = expect[0, 1] = 1  # the last entry of what the regression reads is a one
    return {
        "keys": np.array([4, DOG]), "idf": np.ones(2, np.float32), "sizes": np.array([2, 0, 0, 0]),
        "centre": np.zeros(4, np.float32), "project": project, "units": np.ones(1, np.float32),
        "expect": expect, "log_images": math.log(100), "weight": 128.0,
    }  # fmt: skip


def write_checkpoint(path: Path, name: str, stages: int) -> None:
    """A checkpoint whose weights are large, so that captions differ, and rounded as an export stores them."""
    checkpoint = sound_checkpoint.__wrapped__(name)
    sizes = {"embed_size": 8, "hidden_size": 8, "attention_dim": 8, "num_heads": 2}
    flags = checkpoint["flags"] | sizes | {"fine_tune": stages, "views": "mirror", "max_length": 8}
    checkpoint["vocabulary"] += ["cat", "bird", "runs", "sits", "red", "blue"]
    spec = SPEC.without_last(stages)
    torch.manual_seed(0)
    decoder = build_decoder(flags, len(checkpoint["vocabulary"]), spec)
    inner = decoder.decoder if stages else decoder
    generator = torch.Generator().manual_seed(1)
    for parameter in inner.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.7
    inner.output_bias.data[[EOS, DOG]] = torch.tensor([-2.5, 0.5])
    parameters = iter(decoder.parameters())
    groups = [
        {"params": [next(parameters) for _ in range(size)], "betas": tuple([0.9, 0.999])}
        for size in group_sizes(decoder)
    ]  # no tuple of two groups, which a checkpoint cannot have
    checkpoint |= {
        "flags": flags, "decoder": {name: each.half().float() for name, each in decoder.state_dict().items()},
        "optimizer": torch.optim.AdamW(groups, fused=True).state_dict(), "consensus": head_for_dogs(),
        "encoder": checkpoint["encoder"] | {"transform": spec.transform},
    }  # fmt: skip
    save_checkpoint(path, checkpoint)


@pytest.fixture(scope="module", params=[(name, stages) for name in registry.DECODERS for stages in (0, 1)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, stages = request.param
    folder = tmp_path_factory.mktemp(name)
    with in_place_of_resnet50(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_model, "SMALL", 16)  # bytes: nearly all weights lie in model.safetensors
        write_checkpoint(folder / "best.pt", name, stages)
        export_model.export(load_checkpoint(folder / "best.pt"), folder / "best.pt", folder / "model", None)
        yield Pair(name, Captioner.load(folder / "best.pt"), Captioner.load(folder / "model"))


def likeness(text: str) -> float:
    """The cosine of a caption to the regression's "dog", in its n-grams of one word; other words and the end are rare."""
    counts = Counter(text.split())
    known = counts.pop("dog", 0), counts.pop("a", 0)
    return known[0] / math.sqrt(
        sum(n**2 for n in known) + math.log(100) ** 2 * sum(n**2 for n in (1, *counts.values()))
    )


def photos() -> list[np.ndarray]:
    """Of any colours, darker to the right: the views differ."""
    generator = np.random.default_rng(0)
    noise, colors = generator.random((5, 60, 80, 3)), generator.random((5, 1, 1, 3))
    return list((255 * colors * noise * np.linspace(1, 0, 80)[:, None]).astype(np.uint8))


def assert_same(ours: list[Captioned], theirs: list[Captioned]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert [each.text for each in one.captions] == [each.text for each in other.captions]
        for caption, same in zip(one.captions, other.captions, strict=True):
            assert caption.log_probability == pytest.approx(same.log_probability, abs=1e-3)
            assert caption.end_probability == pytest.approx(same.end_probability, abs=1e-3)
            chances = [word.probability for word in same.words]
            assert [word.probability for word in caption.words] == pytest.approx(chances, abs=1e-3)
            assert (caption.attention is None) == (same.attention is None)
            if caption.attention is not None:
                np.testing.assert_allclose(caption.attention, same.attention, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 1}, {"beam_size": 4, "num_captions": 4, "consensus": "off"}, {"beam_size": 6, "num_captions": 6},
        {"beam_size": 3, "no_repeat_ngram": 2, "length_penalty": 1.5}, {"top_p": 0.9, "num_captions": 4},
    ],
    ids=["greedy", "beam", "consensus", "no repeats", "top_p"],
)  # fmt: skip
def test_pytorch_and_onnx_runtime_say_the_same(pair, options):
    found = []
    for captioner in pair[1:]:
        captioner.generator = np.random.default_rng(5)
        found.append(captioner(photos(), **options))
    assert_same(*found)
    if "num_captions" in options:
        assert len({caption.text for each in found[0] for caption in each.captions}) > 1


def test_captions_by_consensus_from_a_checkpoint_and_an_export(pair):
    for captioner in pair[1:]:
        varied = False
        for photo in photos():
            found = captioner(photo, beam_size=6, num_captions=6)
            plain = captioner(photo, beam_size=6, num_captions=6, consensus="off")
            dogs = [likeness(each.text) for each in found.captions]
            assert dogs[0] > max(dogs) - 0.04  # the beam's say is at most 10, of 128 x 10 / 4
            varied |= max(dogs) - 0.04 > min(dogs)
            assert {each.text for each in found.captions} & {each.text for each in plain.captions}
            for word in found.words:
                assert (word.attention is not None) == find_decoder(pair.name).has_attention
                assert word.attention is None or (
                    word.attention.shape == (7, 7) and word.attention.sum() == pytest.approx(1)
                )
        assert varied or pair.name == "lstm"  # which is sure of its words
