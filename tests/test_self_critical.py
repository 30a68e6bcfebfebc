"""The reward is pycocoevalcap's CIDEr to the last digits; samples are drawn from the decoder's own distribution."""

import argparse
import copy

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider_scorer import CiderScorer
from random_captions import WORDS, random_set

from captioning.config.registry import DECODERS
from captioning.data.dataset import EOS, PAD, SOS, UNK, CaptionSet, Vocabulary, build_vocabulary
from captioning.decoders.base import Decoder, build_decoder
from captioning.decoders.ensemble import Ensemble
from captioning.decoding import beam_search as searching
from captioning.decoding.beam_search import beam_search
from captioning.encoders.base import EncoderSpec
from captioning.scoring.cider import CiderReward
from captioning.training.self_critical import SelfCritic, sample


@pytest.fixture(scope="module")
def data() -> CaptionSet:
    return random_set(train=10, val=1, test=1)


def flat(texts) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all words of the texts, and where each text begins."""
    ids = [WORDS.index(word) for text in texts for word in text]
    return np.array(ids), np.concatenate([[0], np.cumsum([len(text) for text in texts])])


class OfLength(list):
    """A list whose `len` is a given number."""

    length = 0

    def __len__(self) -> int:
        return self.length


def coco_reward(data: CaptionSet, texts: list[str], images: np.ndarray) -> np.ndarray:
    """pycocoevalcap's CIDEr-D (R,) of texts of training images, with the document frequencies of the training captions."""

    def references(image: int) -> list[str]:
        return [f"{text} <EOS>" for text in data.references(image)]

    train, known, scorer = data.splits["train"], CiderScorer(n=4, sigma=6.0), CiderScorer(n=4, sigma=6.0)
    for image in train:
        known += (None, references(image))
    known.compute_doc_freq()
    for text, image in zip(texts, images, strict=True):
        scorer += (f"{text} <EOS>".strip(), references(image))
    scorer.document_frequency = known.document_frequency
    scorer.crefs = OfLength(scorer.crefs)
    scorer.crefs.length = len(train)  # where the scorer takes the number of images from
    return np.array(scorer.compute_cider())


def test_the_reward_is_pycocoevalcaps(data):
    random = np.random.default_rng(1)
    images = random.choice(data.splits["train"], 60)
    texts = []
    for number, image in enumerate(images):
        own = data.references(image)[0].split()
        texts.append([own, own[:2], random.permutation(own).tolist(), own + own, [], ["w29", "w28", "w29"]][number % 6])
    ids, offsets = flat(texts)
    ours = CiderReward(data, data.splits["train"]).score(ids, offsets, images)
    theirs = coco_reward(data, [" ".join(text) for text in texts], images)
    assert np.abs(ours - theirs).max() < 1e-9 and ours.max() > 1


def test_pairwise_cider_is_the_reward_with_one_reference(data):
    reward = CiderReward(data, data.splits["train"])
    image = int(np.argmax(np.diff(data.first_caption[:11])))  # the one with the most captions
    own = [reference.split() for reference in data.references(image)]
    texts = [own[0], own[1][:2], [*own[0], "w29"], [], *own]
    ids, offsets = flat(texts)
    together = reward.pairwise_cider(ids, offsets)
    assert together.shape == (len(texts), len(texts)) and together[0, 0] == pytest.approx(10)
    alone = reward.score(ids[: offsets[4]], offsets[:5], np.full(4, image))
    assert np.abs(together[:4, 4:].mean(1) - alone).max() < 1e-9 and alone[0] > 1


def test_a_word_that_the_data_lacks_is_no_end_of_the_caption(data):
    reward = CiderReward(data, data.splits["train"])
    words = reward.words_of(Vocabulary([*build_vocabulary(data, 1).words, "unheard", "of"]))
    assert (words[-2:] == len(WORDS)).all() and words.min() >= 0
    own = [WORDS.index(word) for word in data.references(0)[0].split()]
    rare = [word for word in range(len(WORDS)) if word not in data.tokens.ids]

    def score(*ids: int) -> float:
        return float(reward.score(np.array(ids), np.array([0, len(ids)]), np.array([0]))[0])

    assert [score(*own, last) for last in rare] == pytest.approx([score(*own, len(WORDS))] * len(rare))
    assert score(*own, len(WORDS)) < score(*own)


def small(kind: str, words: int) -> Decoder:
    torch.manual_seed(0)
    sizes = {"embed_size": 12, "hidden_size": 12, "num_layers": 1, "attention_dim": 12, "num_heads": 2}
    flags = {"decoder": kind, "drop_prob": 0.3, "max_length": 12, **sizes}
    return build_decoder(flags, words, EncoderSpec("eight", 8, (0.0,) * 3, (1.0,) * 3))


@pytest.mark.parametrize("kind", DECODERS)
def test_samples_follow_the_decoders_distribution(kind):
    decoder = small(kind, 7)
    features = torch.randn(1, *((49, 8) if decoder.uses_grid else (8,)))
    torch.manual_seed(1)
    drawn = sample(decoder, features, 4000, 3)
    expected = Ensemble([(decoder, features)]).step(np.array([SOS]), 7)
    share = np.bincount(drawn.words[:, 0], minlength=7)[expected.ids[0]] / 4000
    allowed = np.exp(expected.log_probabilities[0])  # none of <PAD>, <SOS> and <UNK>
    assert sorted(expected.ids[0][allowed == 0]) == [PAD, SOS, UNK] and share[allowed == 0].sum() == 0
    assert np.abs(share - allowed / allowed.sum()).max() < 0.03


def test_the_nucleus_keeps_the_likeliest_words():
    decoder = small("lstm", 40)
    reading, again = (Ensemble([(decoder, torch.randn(5, 8, generator=torch.manual_seed(1)))]) for _ in range(2))
    drawn = searching.sample(reading, 3, 6, 1e-6, np.random.default_rng(0))
    greedy = beam_search(again, 1, 6)  # one word has it all: the three samples are the greedy caption
    assert [[each.ids for each in found] for found in drawn] == [[found[0].ids] for found in greedy]


def test_the_words_of_a_nucleus_are_drawn_by_their_probability():
    decoder = small("lstm", 9)
    features = torch.randn(1, 8)
    following = Ensemble([(decoder, features)]).step(np.array([SOS]), 9)
    chances = np.exp(following.log_probabilities[0])
    kept = np.cumsum(chances) - chances < 0.5  # the word that reaches the half is the last
    drawn = [
        searching.sample(Ensemble([(decoder, features)]), 1, 1, 0.5, np.random.default_rng(seed))[0][0]
        for seed in range(1000)
    ]
    first = [each.ids[0] if each.ids else EOS for each in drawn]
    share = np.bincount(first, minlength=9)[following.ids[0]] / 1000
    assert 1 < kept.sum() < 6 and not share[~kept].any()
    assert np.abs(share[kept] - chances[kept] / chances[kept].sum()).max() < 0.05


def test_samples_end_and_say_so():
    decoder = small("attention", 9)
    drawn = sample(decoder, torch.randn(6, 49, 8), 5, 12)
    for words, length, ended in zip(*drawn, strict=True):
        assert (words[length:] == EOS).all() and EOS not in words[:length] and ended == (length < 12)


@pytest.mark.parametrize("kind", DECODERS)
def test_samples_know_their_log_probability(kind):
    decoder = small(kind, 9)
    features = torch.randn(2, *((49, 8) if decoder.uses_grid else (8,)))
    drawn = searching.sample(Ensemble([(decoder, features)]), 2, 12, 0.8, np.random.default_rng(0))
    for image, found in enumerate(drawn):
        assert len({tuple(each.ids) for each in found}) == len(found) <= 2
        for each in found:
            ensemble, word, expected = Ensemble([(decoder, features[image : image + 1])]), SOS, []
            for target in [*each.ids, *([EOS] if len(each.ids) < 12 else [])]:
                known = ensemble.step(np.array([word]), 9)
                expected, word = [*expected, known.log_probabilities[known.ids == target][0]], target
            assert each.log_probabilities == pytest.approx(expected, abs=1e-4)
            assert each.score == each.log_probability == pytest.approx(sum(expected), abs=1e-3)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_gradient_is_that_of_the_written_out_formula(data, kind):
    """Against log-probabilities of the samples, taken word by word through `step`."""
    vocabulary = build_vocabulary(data, 1)
    decoder = small(kind, len(vocabulary)).eval()
    decoder.dropout.probability = 0.0
    images = np.array([2, 5, 7])
    features = torch.randn(3, *((49, 8) if decoder.uses_grid else (8,)))
    critic = SelfCritic(data, vocabulary, argparse.Namespace(scst_samples=4, max_length=10))
    torch.manual_seed(3)
    drawn = sample(decoder, features, 4, 10)
    rewards = critic.rewards(drawn.words, drawn.lengths, drawn.ended, images)
    torch.manual_seed(3)
    loss, reward = critic.loss(decoder, features, images, torch.autocast("cpu", enabled=False))
    assert reward == pytest.approx(rewards.mean())
    loss.backward()
    found = torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()])
    decoder.zero_grad()

    total, tokens = torch.zeros(()), 0
    for row in range(12):
        image, number = divmod(row, 4)
        advantage = rewards[image, number] - (rewards[image].sum() - rewards[image, number]) / 3
        state, word = decoder.begin(features[image : image + 1]), torch.tensor([SOS])
        said = [*drawn.words[row, : drawn.lengths[row]].tolist(), *([EOS] if drawn.ended[row] else [])]
        for target in said:
            state, output = decoder.step(state, word)
            total = total - advantage * decoder.logits(output.hidden_out).log_softmax(-1)[0, target]
            word = torch.tensor([target])
        tokens += int(drawn.lengths[row]) + 1
    (total / tokens).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()])
    assert torch.allclose(found, expected, atol=1e-6) and found.abs().max() > 1e-5


def test_views_of_one_decoder_say_what_several_decoders_of_the_same_weights_say():
    """The views of one decoder run as one batch."""
    decoder, other = small("attention", 20).double(), small("lstm", 20).double()  # so that no near tie decides
    torch.manual_seed(1)
    views = torch.randn(3, 9, 49, 8).double()
    decoder.output_bias.data[EOS] = 1
    decoder.embed.weight.data *= 6
    means = (other, 5 * views[0].mean(1))
    shared = beam_search(
        Ensemble([*((decoder, view) for view in views), means]), 4, 12, attention=True, num_hypotheses=4
    )
    copies = [(copy.deepcopy(decoder), view) for view in views]
    alone = beam_search(Ensemble([*copies, means]), 4, 12, attention=True, num_hypotheses=4)
    for one, two in zip(shared, alone, strict=True):
        assert [h.ids for h in one] == [h.ids for h in two]
        for first, second in zip(one, two, strict=True):
            assert first.score == pytest.approx(second.score, abs=1e-5)
            np.testing.assert_allclose(first.attention, second.attention, atol=1e-5)
