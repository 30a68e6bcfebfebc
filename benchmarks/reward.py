"""Self-critical training: the time of a step, the reward's part of it, and the reward against pycocoevalcap's scorer."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
from measure import Bench, Figure, compared, interleaved
from pycocoevalcap.cider.cider_scorer import CiderScorer
from training import Trial, flags_for, prepare_features

from captioning.dataset import CaptionSet
from captioning.decoding import sample

PART = "reward"


def measure(bench: Bench) -> list[Figure]:
    data_dir = prepare_features(bench)
    return [figure for decoder in bench.scale.sizes["small"] for figure in measure_decoder(bench, data_dir, decoder)]


def measure_decoder(bench: Bench, data_dir: Path, decoder: str) -> list[Figure]:
    """One decoder, after some steps of cross-entropy, since an untrained one never ends a caption."""
    scale, device = bench.scale, bench.device
    trial = Trial([*flags_for(bench, data_dir, decoder, "small"), "--scst_epochs", "1", "--batch_size", "320"])
    critic, data = trial.run.step_loss.critic, trial.context.data
    trial.shorten(scale.training)
    trial.epoch()
    trial.shorten(scale.steps)
    spent, plain = [0.0], critic.rewards

    def timed(*args: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        rewards = plain(*args)
        spent[0] += time.perf_counter() - start
        return rewards

    critic.rewards = timed
    kinds = ("cross-entropy", "self-critical")  # epoch 0 is trained by cross-entropy, 1 self-critically
    taken = interleaved(
        {kind: partial(trial.epoch, number) for number, kind in enumerate(kinds)}, scale.repeats, device
    )
    plans = [trial.loader.plan(number) for number in range(2)]
    usual, step = (1000 * taken[kind] / len(plan) for kind, plan in zip(kinds, plans, strict=True))
    rewards = 1000 * spent[0] / (len(plans[1]) * (scale.repeats + 1))
    images = trial.batches.make(plans[1][0]).images
    drawn = sample(trial.decoder, trial.run.views[0].gather(images, device), critic.samples, critic.max_length)
    texts = [
        " ".join(trial.context.vocabulary.decode(row[:length]))
        for row, length in zip(drawn.words, drawn.lengths, strict=True)
    ]
    theirs = CocoReward(data, data.splits["train"])
    ways = {
        "ours": lambda: plain(drawn.words, drawn.lengths, np.ones_like(drawn.ended), images),
        "theirs": lambda: theirs.score(texts, np.repeat(images, critic.samples)),
    }
    found = interleaved(ways, scale.repeats, device)
    difference = np.abs(ways["ours"]().reshape(-1) - ways["theirs"]()).max()
    if difference > 1e-6:
        raise AssertionError(f"the reward differs from pycocoevalcap's by {difference}")
    note = f"{len(texts)} samples of {len(images)} images a step, {drawn.lengths.mean():.1f} words on average"
    ours, scorer = 1000 * found["ours"], 1000 * found["theirs"]
    return [
        Figure(PART, f"{decoder}: a self-critical step", step, "ms", "a step of cross-entropy", usual, step / usual, note=note),
        Figure(PART, f"{decoder}: the reward in it", rewards, "ms", "the whole step", step, rewards / step).must("<", 1 / 3),
        compared(PART, f"{decoder}: rewards of {len(texts)} samples", ours, "ms", "pycocoevalcap", scorer),
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
    """A list whose `len` is a given number."""

    length = 0

    def __len__(self) -> int:
        return self.length
