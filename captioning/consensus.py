"""Consensus decoding: of the captions that a beam ended with, the one that agrees best with the evidence.

The most probable caption is not the one that scores best, since CIDEr-D rewards what a caption shares with the
references. The references are unknown, but two estimates of them are not: the beam's own captions, weighted by their
probability (minimum Bayes risk decoding, Kumar and Byrne, 2004), and a regression from image features to captions,
fitted to the training images. The regression refines the captions of similar images (consensus re-ranking, Devlin et
al., 2015). Of the scored images only the features are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from captioning.cider import CiderReward, cider_of_each
from captioning.dataset import CaptionSet, Vocabulary
from captioning.decoding import Hypothesis
from captioning.encoders import ENCODE_BATCH
from captioning.features import Features
from captioning.io import bars_off, log

BEAM_SIZE = 20  # the default: consensus needs many captions to choose from
CANDIDATES = 100  # captions of an image at most, best first; a beam of 20 ends with about as many
# Tuned on the validation images of Flickr8k (docs/experiments.md).
TEMPERATURE = 3.0  # divides the beam's log-probabilities: a beam is overconfident of its first captions
RIDGE = 0.1  # of the regression
REGRESSION_WEIGHTS = (0.0, 2.0, 4.0, 8.0, 12.0)  # of the regression, against 1 for all the beam's captions together
REGRESSION_IMAGES = 10_000  # training images at most, drawn at random: time grows with the cube

Evidence = tuple[np.ndarray, np.ndarray]  # CIDEr of an image's candidates expected by the beam and by the regression


def regression_images(train: np.ndarray) -> np.ndarray:
    """Return the training images, out of all (T,), that the regression is fitted to: the same at each call."""
    if len(train) <= REGRESSION_IMAGES:
        return train
    return np.sort(np.random.default_rng(0).choice(train, REGRESSION_IMAGES, replace=False))


class Consensus:
    """Ranks captions by expected CIDEr-D, with the document frequencies of the training captions."""

    def __init__(self, data: CaptionSet, vocabulary: Vocabulary, views: Sequence[Features]):
        """Args: views: views of the images, (I, C) each, for the regression; none for the beam's captions alone."""
        self.data = data
        self.vocabulary = vocabulary
        self.views = views
        self.cider = CiderReward(data, data.splits["train"])
        self.fitted = regression_images(data.splits["train"])
        self.word_of = self.cider.words_of(vocabulary)

    def evidence(
        self, images: np.ndarray, found: Sequence[list[Hypothesis]], temperature: float = TEMPERATURE
    ) -> list[Evidence]:
        """Score the candidates of each image, which are its first H = CANDIDATES hypotheses at most.

        Args:
            images: positions (n,) in the caption set.
            found: the hypotheses of each, best first.

        Returns:
            for each image the CIDEr-D (H,) of its candidates expected by the beam, and the CIDEr (H,) expected by the
            regression, which is 0 without one.
        """
        evidence = []
        bar = tqdm(found, "Comparing captions", unit="image", disable=bars_off(), leave=False)
        for hypotheses, shares in zip(bar, self.regress(images), strict=True):
            candidates = hypotheses[:CANDIDATES]
            words = [self.word_of[each.ids] for each in candidates]
            ids, offsets = np.concatenate(words), np.cumsum([0, *map(len, words)])
            log_probabilities = np.array([each.log_probability for each in candidates])
            chances = np.exp((log_probabilities - log_probabilities.max()) / temperature)
            by_beam = self.cider.pairwise_cider(ids, offsets) @ (chances / chances.sum())
            by_regression = np.zeros(len(candidates))
            if self.views:
                by_regression = self.cider.cider_to_mixture(ids, offsets, self.fitted, shares)
            evidence.append((by_beam, by_regression))
        return evidence

    def tune_weight(self, found: Sequence[list[Hypothesis]], evidence: Sequence[Evidence], images: np.ndarray) -> float:
        """Return the regression's weight with the best CIDEr, the smaller where two are equal.

        A regression fitted to few images, or to features that tell little, deserves little weight.

        Args:
            found: the hypotheses of the validation images.
            evidence: what `evidence` returns for them.
            images: their positions (n,).
        """
        references = [self.data.references(image) for image in images]

        def cider(weight: float) -> float:
            captions = [" ".join(self.vocabulary.decode(best.ids)) for best in pick_best(found, evidence, weight)]
            return float(cider_of_each(captions, references).mean())

        scores = {weight: cider(weight) for weight in REGRESSION_WEIGHTS}
        best = max(scores, key=lambda weight: (scores[weight], -weight))
        tried = ", ".join(f"{weight:g}: {100 * value:.1f}" for weight, value in scores.items())
        log.info(f"Weight of the regression: {best:g}, by CIDEr on {len(images)} validation images ({tried})")
        return best

    def regress(self, images: np.ndarray) -> np.ndarray:
        """Return the weight of each fitted image's captions in the prediction for each of `images`.

        Kernel ridge regression (Saunders et al., 1998) with the exponential of the cosine of two images' centred
        features as its kernel. Its prediction is linear in the captions, so that these weights determine it.

        Returns:
            (n, F), which may be negative; (n, 0) without views.
        """
        if not self.views or not len(images):  # one of several processes may have no images
            return np.zeros((len(images), 0))
        known = self.gather(self.fitted)  # (F, C)
        centre = known.mean(0)
        known = torch.nn.functional.normalize(known - centre)
        queries = torch.nn.functional.normalize(self.gather(images) - centre)  # (n, C)
        kernel = (known @ known.T).sub_(1).exp_()  # (F, F), up to 800 MB
        kernel.diagonal().add_(RIDGE)
        factor = torch.linalg.cholesky(kernel)  # half the time of solving it as any other matrix
        shares: np.ndarray = torch.cholesky_solve(torch.exp(known @ queries.T - 1), factor).T.numpy()
        return shares

    def gather(self, images: np.ndarray) -> torch.Tensor:
        """Return features (n, C), float64, averaged over the views; in batches, since `Features` may encode now."""
        batches = [images[start : start + ENCODE_BATCH] for start in range(0, len(images), ENCODE_BATCH)]
        means = [torch.stack([view.gather(batch).cpu() for view in self.views]).double().mean(0) for batch in batches]
        return torch.cat(means)


def pick_best(found: Sequence[list[Hypothesis]], evidence: Sequence[Evidence], weight: float = 0.0) -> list[Hypothesis]:
    """Return the best hypothesis of each image by its evidence, with this weight of the regression."""
    return [
        hypotheses[int((by_beam + weight * by_regression).argmax())]
        for hypotheses, (by_beam, by_regression) in zip(found, evidence, strict=True)
    ]
