"""Beam search and sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from captioning.data.dataset import EOS, PAD, SOS, UNK
from captioning.decoders.base import Decoder, DecoderState

# --------------------------------------------------------------------------------------------------
# Decoding


class Hypothesis(NamedTuple):
    """One generated caption."""

    ids: list[int]  # words, without <SOS> and <EOS>
    log_probability: float  # of all its words and, where it ended by itself, of <EOS>
    score: float  # log_probability / length ** length_penalty, by which hypotheses are ranked
    attention: np.ndarray | None  # (words, 49) alphas, each row sums to one
    log_probabilities: list[float]  # of each word and, where it ended by itself, of <EOS>: they sum to log_probability


Member = tuple[Decoder, torch.Tensor]  # a decoder and its features of the images: (I, C) or (I, 49, C)


class Ensemble:
    """Members that read the same words and average their probabilities of the next one.

    Members that share a decoder, such as the views of an image, run as one batch: the images of the first view, then
    those of the second, and so on.
    """

    def __init__(self, members: Sequence[Member]):
        """Read the images, of which each has one row at first. Puts the decoders in eval mode."""
        features_of: dict[Decoder, list[torch.Tensor]] = {}
        for decoder, features in members:
            features_of.setdefault(decoder.eval(), []).append(features)
        self.decoders = list(features_of)
        self.views = [len(views) for views in features_of.values()]
        self.states: list[DecoderState] = [decoder.begin(torch.cat(views)) for decoder, views in features_of.items()]
        self.images = self.rows = len(members[0][1])

    def step(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read one word in every row.

        Args:
            words: int64 (rows,) the last word of each, `<SOS>` at first.

        Returns:
            log-probabilities (rows, V) of the next word, with `<PAD>`, `<SOS>` and `<UNK>` at minus infinity, and the
            first member's alphas (rows, 49), None without attention.
        """
        logits, alphas = [], []
        for number, (decoder, views) in enumerate(zip(self.decoders, self.views, strict=True)):
            self.states[number], output = decoder.step(self.states[number], words.repeat(views))
            logits.append(decoder.logits(output.hidden_out).float().unflatten(0, (views, self.rows)))
            alphas.append(output.alphas)
        members = sum(self.views)
        if members == 1:
            log_probabilities = logits[0][0].log_softmax(-1)
        else:
            probabilities = torch.stack([each.softmax(-1).sum(0) for each in logits]).sum(0)
            log_probabilities = probabilities.div_(members).log_()
        log_probabilities[:, [PAD, SOS, UNK]] = -math.inf
        return log_probabilities, None if alphas[0] is None else alphas[0][: self.rows]

    def select(self, rows: torch.Tensor, images: torch.Tensor | None = None) -> None:
        """Go on with these rows, int64 (n,), as in `DecoderState`. Args: images: whose rows they are, None for all."""
        for number, views in enumerate(self.views):
            state = self.states[number].select_rows(in_every_view(rows, views, self.rows))
            if images is not None:
                state = state.select_images(in_every_view(images, views, self.images))
            self.states[number] = state
        self.rows, self.images = len(rows), self.images if images is None else len(images)


def in_every_view(places: torch.Tensor, views: int, size: int) -> torch.Tensor:
    """Return these places of the first view, and the same of every other. Args: size: places of a view."""
    return (places + size * torch.arange(views, device=places.device).unsqueeze(1)).flatten()


@torch.inference_mode()
def beam_search(
    members: Sequence[Member],
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.7,
    attention: bool = False,
    num_hypotheses: int = 1,
    no_repeat_ngram: int = 0,
) -> list[list[Hypothesis]]:
    """Caption a whole batch of images at once; beam size 1 is greedy decoding.

    Starts from `<SOS>`, as training does, ends at `<EOS>` and never gives `<PAD>`, `<SOS>` or `<UNK>`. An image is
    finished when no live hypothesis can still beat its `num_hypotheses` best ended ones, whatever the other images
    of the batch do, so that results do not depend on which images share a batch. Where nothing ended after `max_length`
    words, the live hypotheses of so many words are returned, with the score of these words.

    Args:
        members: one decoder with its features of the images, or an ensemble: several decoders, or several views of
            the images. They share a vocabulary.
        length_penalty: exponent of the length by which a log-probability is divided (Wu et al., 2016, simplified).
        attention: keep the first member's alphas of every word.
        num_hypotheses: how many of an image; a beam of at least that size mostly finds them.
        no_repeat_ngram: no caption has the same n words twice; 0 for no such rule.

    Returns:
        for every image its hypotheses, best first and no two alike; at least one.
    """
    keeps_attention = attention and members[0][0].has_attention
    device, images = members[0][1].device, len(members[0][1])
    found: list[list[Hypothesis]] = [[] for _ in range(images)]
    alive = list(range(images))  # which images the rows below belong to
    ensemble = Ensemble(members)
    words = torch.full((images,), SOS, device=device)
    scores = torch.zeros(images, 1, device=device)  # (I, K) log-probabilities of the live hypotheses, best first
    history = torch.zeros(images, 1, 0, dtype=torch.long, device=device)  # (I, K, t) their words
    score_history = torch.zeros(images, 1, 0, device=device)  # (I, K, t) the log-probabilities of these words
    attention_history = torch.zeros(images, 1, 0, 0, device=device)  # (I, K, t, 49) their alphas
    ended_scores = torch.full((images, num_hypotheses), -math.inf, device=device)  # the best, best first
    longest = float(max_length + 1) ** length_penalty

    def keep(image: torch.Tensor, row: torch.Tensor, log_probability: torch.Tensor, each: torch.Tensor) -> None:
        """Keep live hypotheses (n,) as they stand. Args: each: (n, length) of their words, and `<EOS>` where they ended."""
        ids, length = history[image, row].tolist(), each.shape[1]
        alphas = attention_history[image, row].float().cpu().numpy() if keeps_attention else [None] * len(ids)
        kept = zip(image.tolist(), ids, log_probability.tolist(), alphas, each.tolist(), strict=True)
        for i, words, value, maps, own in kept:
            own_maps = None if maps is None else maps[: len(words)]
            found[alive[i]].append(Hypothesis(words, value, value / length**length_penalty, own_maps, own))

    for time in range(max_length + 1):
        log_probabilities, alphas = ensemble.step(words)
        count, beams = scores.shape
        vocabulary = log_probabilities.shape[1]
        total = log_probabilities.view(count, beams, vocabulary).add_(scores.unsqueeze(2))
        if 0 < no_repeat_ngram <= time:
            forbid_repeats(total, history, no_repeat_ngram)
        best, index = total.flatten(1).topk(min(2 * beam_size, beams * vocabulary))  # (I, 2B)
        parent, word = index // vocabulary, index % vocabulary
        gain = (best - scores.gather(1, parent)).unsqueeze(2)  # (I, 2B, 1) log-probability of the word alone
        ends = word == EOS
        ended = best.masked_fill(~ends, -math.inf)[:, :beam_size]
        if keeps_attention and alphas is not None:
            now = alphas.view(count, beams, 1, -1)
            attention_history = now if time == 0 else torch.cat([attention_history, now], 2)

        image, place = ended.isfinite().nonzero(as_tuple=True)
        row = parent[image, place]
        keep(image, row, ended[image, place], torch.cat([score_history[image, row], gain[image, place]], 1))
        if time == max_length:  # no caption takes another word
            unfinished = torch.tensor([not found[number] for number in alive], device=device)
            image, row = (scores.isfinite() & unfinished.unsqueeze(1)).nonzero(as_tuple=True)
            keep(image, row, scores[image, row], score_history[image, row])
            break
        # The first beam_size candidates that go on are the next live hypotheses.
        order = ends.int().argsort(dim=1, stable=True)[:, :beam_size]
        scores = best.masked_fill(ends, -math.inf).gather(1, order)
        ended_scores = torch.cat([ended_scores, ended / (time + 1) ** length_penalty], 1).topk(num_hypotheses).values
        can_win = scores[:, 0] / longest > ended_scores[:, -1]  # however long it grows
        if beam_size == 1:
            can_win &= ~ends[:, 0]  # greedy decoding ends with its first <EOS>
        going = can_win.nonzero().squeeze(1)
        if len(going) == 0:
            break
        image = going.unsqueeze(1)
        order, scores, ended_scores = order[going], scores[going], ended_scores[going]
        parent, words = parent[going].gather(1, order), word[going].gather(1, order)
        history = torch.cat([history[image, parent], words.unsqueeze(2)], 2)
        score_history = torch.cat([score_history[image, parent], gain[image, order]], 2)
        if keeps_attention:
            attention_history = attention_history[image, parent]
        ensemble.select((image * beams + parent).flatten(), going if len(going) < count else None)
        words, alive = words.flatten(), [alive[i] for i in going.tolist()]
    return [sorted(hypotheses, key=lambda h: -h.score) for hypotheses in found]


def forbid_repeats(total: torch.Tensor, history: torch.Tensor, n: int) -> None:
    """Set the score of each word that would complete an n-gram of its hypothesis again to minus infinity.

    Args:
        total: (I, K, V) scores of the next words, changed in place.
        history: int64 (I, K, t) the words so far, t >= n.
    """
    known = history.unfold(2, n, 1)  # (I, K, t - n + 1, n): every n-gram so far
    last = history[:, :, history.shape[2] - n + 1 :].unsqueeze(2)  # (I, K, 1, n - 1): what the next word would complete
    image, row, place = (known[..., :-1] == last).all(-1).nonzero(as_tuple=True)
    total[image, row, known[image, row, place, -1]] = -math.inf


class Samples(NamedTuple):
    """Captions drawn at random, the `count` of an image one after another."""

    words: np.ndarray  # int64 (I x count, T) ids, <EOS> from the end on
    lengths: np.ndarray  # int64 (I x count,) words before <EOS>
    ended: np.ndarray  # bool (I x count,) whether <EOS> was drawn
    log_probabilities: np.ndarray  # float32 (I x count, T) of each draw, by the whole distribution; 0 after `<EOS>`


@torch.no_grad()
def sample(
    decoder: Decoder, features: torch.Tensor, count: int, max_length: int, top_p: float = 1.0
) -> Samples:  # fmt: skip
    """Draw captions word by word from the decoder's own distribution, in eval mode, seeded by `torch.manual_seed`.

    Args:
        features: (I, C) or (I, 49, C).
        top_p: keep to the likeliest words that together have this probability (nucleus sampling, Holtzman et al., 2020).
    """
    training = decoder.training
    ensemble = Ensemble([(decoder, features)])
    device = features.device
    drawn = torch.full((len(features) * count, max_length), EOS, device=device)
    rows = torch.arange(len(drawn), device=device)  # which rows of `drawn` go on
    ensemble.select(rows // count)
    words = torch.full_like(rows, SOS)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    scores = torch.zeros(drawn.shape, device=device)
    for time in range(max_length):
        log_probabilities, _ = ensemble.step(words)
        chances = log_probabilities.exp()  # (rows, V)
        if top_p < 1:
            ranked, order = chances.sort(descending=True)
            ranked[ranked.cumsum(1) - ranked >= top_p] = 0
            chances = torch.zeros_like(chances).scatter(1, order, ranked)
        sums = chances.cumsum(1)
        points = torch.rand(len(rows), 1, device=device) * sums[:, -1:]
        words = torch.searchsorted(sums, points, right=True).squeeze(1).clamp(max=sums.shape[1] - 1)
        scores[rows, time] = log_probabilities.gather(1, words.unsqueeze(1)).squeeze(1).masked_fill(ended, 0)
        words = torch.where(ended, EOS, words)
        ended = words == EOS
        drawn[rows, time] = words
        going = ~ended.view(-1, count).all(1)  # an image's rows lie together, so they leave together
        left = int(going.sum())
        if left == 0:
            break
        if left < 0.8 * len(going):
            kept = going.nonzero().squeeze(1)
            stay = (kept.unsqueeze(1) * count + torch.arange(count, device=device)).flatten()
            ensemble.select(stay, kept)
            rows, words, ended = rows[stay], words[stay], ended[stay]
    decoder.train(training)
    result = drawn.cpu().numpy()
    lengths = (result != EOS).sum(1)
    return Samples(result, lengths, lengths < max_length, scores.cpu().numpy())
