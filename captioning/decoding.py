"""Beam search and sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from captioning.dataset import EOS, PAD, SOS, UNK
from captioning.decoders import Decoder, DecoderState

# --------------------------------------------------------------------------------------------------
# Decoding


class Hypothesis(NamedTuple):
    """One generated caption."""

    ids: list[int]  # words, without <SOS> and <EOS>
    log_probability: float  # of all its words and, where it ended by itself, of <EOS>
    score: float  # log_probability / length ** length_penalty, by which hypotheses are ranked
    attention: np.ndarray | None  # (words, 49) alphas, each row sums to one


Member = tuple[Decoder, torch.Tensor]  # a decoder and its features of the images: (I, C) or (I, 49, C)


def next_words(
    members: Sequence[Member], states: list[DecoderState], words: torch.Tensor
) -> tuple[list[DecoderState], torch.Tensor, torch.Tensor | None]:
    """Average the members' probabilities of the next word.

    Returns:
        their new states, log-probabilities (rows, V) with `<PAD>`, `<SOS>` and `<UNK>` at minus infinity, and the
        first member's alphas (rows, 49), None without attention.
    """
    steps = [decoder.step(state, words) for (decoder, _), state in zip(members, states, strict=True)]
    each = [
        decoder.logits(output.hidden_out).float().log_softmax(-1)
        for (decoder, _), (_, output) in zip(members, steps, strict=True)
    ]
    together = each[0] if len(each) == 1 else torch.logsumexp(torch.stack(each), 0) - math.log(len(each))
    together[:, [PAD, SOS, UNK]] = -math.inf
    return [state for state, _ in steps], together, steps[0][1].alphas


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
    for decoder, _ in members:
        decoder.eval()
    device, images = members[0][1].device, len(members[0][1])
    found: list[list[Hypothesis]] = [[] for _ in range(images)]
    alive = np.arange(images)  # which images the rows below belong to
    states = [decoder.begin(features) for decoder, features in members]
    words = torch.full((images,), SOS, device=device)
    scores = torch.zeros(images, 1, device=device)  # (I, K) log-probabilities of the live hypotheses
    history = torch.zeros(images, 1, 0, dtype=torch.long, device=device)  # (I, K, t) their words
    attention_history = torch.zeros(images, 1, 0, 0, device=device)  # (I, K, t, 49) the alphas of these words
    longest = float(max_length + 1) ** length_penalty

    def hypothesis(image: int, row: int, log_probability: float, length: int) -> Hypothesis:
        """Return a live hypothesis as it stands. Args: length: its words, and `<EOS>` where it ended."""
        words = history[image, row].tolist()
        alphas = attention_history[image, row, : len(words)].float().cpu().numpy() if keeps_attention else None
        return Hypothesis(words, log_probability, log_probability / length**length_penalty, alphas)

    for time in range(max_length + 1):
        states, log_probabilities, alphas = next_words(members, states, words)
        count, beams = scores.shape
        vocabulary = log_probabilities.shape[1]
        total = scores.unsqueeze(2) + log_probabilities.view(count, beams, vocabulary)
        if 0 < no_repeat_ngram <= time:
            forbid_repeats(total, history, no_repeat_ngram)
        best, index = total.flatten(1).topk(min(2 * beam_size, beams * vocabulary))  # (I, 2B)
        parent, word = index // vocabulary, index % vocabulary
        ends = word == EOS
        if keeps_attention and alphas is not None:
            now = alphas.view(count, beams, 1, -1)
            attention_history = now if time == 0 else torch.cat([attention_history, now], 2)

        for i, k in (ends[:, :beam_size] & best[:, :beam_size].isfinite()).nonzero().tolist():
            found[alive[i]].append(hypothesis(i, int(parent[i, k]), float(best[i, k]), time + 1))
        if time == max_length:  # no caption takes another word
            unfinished = {number for number in alive.tolist() if not found[number]}
            for i, k in scores.isfinite().nonzero().tolist():
                if alive[i] in unfinished:
                    found[alive[i]].append(hypothesis(i, k, float(scores[i, k]), time))
            break
        # The first beam_size candidates that go on are the next live hypotheses.
        order = ends.int().argsort(dim=1, stable=True)[:, :beam_size]
        parent, word = parent.gather(1, order), word.gather(1, order)
        scores = best.gather(1, order).masked_fill(ends.gather(1, order), -math.inf)
        image = torch.arange(count, device=device).unsqueeze(1)
        history = torch.cat([history[image, parent], word.unsqueeze(2)], 2)
        if keeps_attention:
            attention_history = attention_history[image, parent]
        states = [state.select_rows((image * beams + parent).flatten()) for state in states]

        bounds = (scores.max(1).values / longest).tolist()
        going = [
            i
            for i, number in enumerate(alive)
            if not (beam_size == 1 and found[number])  # greedy decoding ends with its first <EOS>
            and sum(ended.score >= bounds[i] for ended in found[number]) < num_hypotheses
            and bounds[i] > -math.inf
        ]
        if not going:
            break
        if len(going) < len(alive):
            kept = torch.tensor(going, device=device)
            beams = scores.shape[1]
            rows = (kept.unsqueeze(1) * beams + torch.arange(beams, device=device)).flatten()
            states = [state.select_rows(rows).select_images(kept) for state in states]
            scores, history, word, alive = scores[kept], history[kept], word[kept], alive[going]
            if keeps_attention:
                attention_history = attention_history[kept]
        words = word.flatten()
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
    log_probabilities: np.ndarray  # float32 (I x count,) of all words drawn, by the whole distribution


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
    decoder.eval()
    device = features.device
    drawn = torch.full((len(features) * count, max_length), EOS, device=device)
    rows = torch.arange(len(drawn), device=device)  # which rows of `drawn` go on
    state = decoder.begin(features).select_rows(rows // count)
    words = torch.full_like(rows, SOS)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    totals = torch.zeros(len(drawn), device=device)
    for time in range(max_length):
        (state,), log_probabilities, _ = next_words([(decoder, features)], [state], words)
        chances = log_probabilities.exp()  # (rows, V)
        if top_p < 1:
            ranked, order = chances.sort(descending=True)
            ranked[ranked.cumsum(1) - ranked >= top_p] = 0
            chances = torch.zeros_like(chances).scatter(1, order, ranked)
        sums = chances.cumsum(1)
        points = torch.rand(len(rows), 1, device=device) * sums[:, -1:]
        words = torch.searchsorted(sums, points, right=True).squeeze(1).clamp(max=sums.shape[1] - 1)
        totals[rows] += log_probabilities.gather(1, words.unsqueeze(1)).squeeze(1).masked_fill(ended, 0)
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
            state = state.select_rows(stay).select_images(kept)
            rows, words, ended = rows[stay], words[stay], ended[stay]
    decoder.train(training)
    result = drawn.cpu().numpy()
    lengths = (result != EOS).sum(1)
    return Samples(result, lengths, lengths < max_length, totals.cpu().numpy())
