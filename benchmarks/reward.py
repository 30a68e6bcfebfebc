"""Self-critical training: the time of a step, the reward's part of it, and the reward against pycocoevalcap's scorer."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import training
from measure import Bench, Figure, interleaved, quicker
from pycocoevalcap.cider.cider_scorer import CiderScorer

from captioning.dataset import CaptionSet
from captioning.decoding import sample

PART = "reward"


def measure(bench: Bench) -> list[Figure]:
    data_dir, _ = training.prepare_data(bench)
    training.prepare_features(bench, data_dir)
    return [figure for decoder in bench.scale.sizes["small"] for figure in measure_decoder(bench, data_dir, decoder)]


def measure_decoder(bench: Bench, data_dir: Path, decoder: str) -> list[Figure]:
    """One decoder, after some steps of cross-entropy, since an untrained one never ends a caption."""
    scale, device = bench.scale, bench.device
    flags = [*training.flags_for(bench, data_dir, decoder, "small"), "--scst_epochs", "1", "--batch_size", "320"]
    run = training.start(bench, flags)
    critic, train = run.step_loss.critic, run.data.splits["train"]
    assert critic is not None
    training.restrict(run, scale.training)
    training.epoch(run)
    run.epoch, run.data.splits["train"] = 1, train
    _, plan = training.restrict(run, scale.steps)
    spent = [0.0]
    plain = critic.rewards

    def timed(*args: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        rewards = plain(*args)
        spent[0] += time.perf_counter() - start
        return rewards

    critic.rewards = timed  # type: ignore[method-assign]

    def epoch(number: int) -> None:  # 0 is trained by cross-entropy, 1 self-critically
        run.epoch = number
        training.epoch(run)

    taken = interleaved({"cross-entropy": lambda: epoch(0), "self-critical": lambda: epoch(1)}, scale.repeats, device)
    usual, step = (1000 * taken[name] / len(plan) for name in ("cross-entropy", "self-critical"))
    rewards = 1000 * spent[0] / (len(plan) * (scale.repeats + 1))
    images = run.batches.make(plan[0]).images
    drawn = sample(run.decoder, run.views[0].gather(images, device), critic.samples, critic.max_length)
    texts = [
        " ".join(run.vocabulary.decode(row[:length])) for row, length in zip(drawn.words, drawn.lengths, strict=True)
    ]
    owners = np.repeat(images, critic.samples)
    theirs = CocoReward(run.data, train)
    ways = {
        "ours": lambda: plain(drawn.words, drawn.lengths, np.ones_like(drawn.ended), images),
        "theirs": lambda: theirs.score(texts, owners),
    }
    found = interleaved(ways, scale.repeats, device)
    difference = np.abs(ways["ours"]().reshape(-1) - ways["theirs"]()).max()
    if difference > 1e-6:
        raise AssertionError(f"the reward differs from pycocoevalcap's by {difference}")
    note = f"{len(texts)} samples of {len(images)} images a step, {drawn.lengths.mean():.1f} words on average"
    return [
        Figure(PART, f"{decoder}: a self-critical step", step, "ms", "a step of cross-entropy", usual, step / usual, note=note),
        Figure(PART, f"{decoder}: the reward in it", rewards, "ms", "the whole step", step, rewards / step).must("<", 1 / 3),
        quicker(
            PART, f"{decoder}: rewards of {len(texts)} samples", 1000 * found["ours"], "pycocoevalcap",
            1000 * found["theirs"], "ms",
        ),
    ]  # fmt: skip


class CocoReward:
    """pycocoevalcap's CIDEr with the document frequencies of given images' captions, an end token after each caption."""

    def __init__(self, data: CaptionSet, images: np.ndarray):
        self.data, self.count = data, len(images)
        known = CiderScorer(n=4, sigma=6.0)
        for image in images:
            known += (None, [f"{text} <EOS>" for text in data.references(image)])
        known.compute_doc_freq()
        self.frequencies = known.document_frequency

    def score(self, texts: list[str], images: np.ndarray) -> np.ndarray:
        """CIDEr-D of each text, of these images (R,)."""
        scorer = CiderScorer(n=4, sigma=6.0)
        for text, image in zip(texts, images, strict=True):
            scorer += (f"{text} <EOS>".strip(), [f"{other} <EOS>" for other in self.data.references(image)])
        scorer.document_frequency = self.frequencies
        scorer.crefs = OfLength(scorer.crefs)
        scorer.crefs.length = self.count  # which is where it takes the number of images from
        return np.array(scorer.compute_cider())


class OfLength(list):
    """A list that says it has another length."""

    length = 0

    def __len__(self) -> int:
        return self.length
