"""The reward is pycocoevalcap's CIDEr to the last digits; samples are drawn from the decoder's own distribution."""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from reward import CocoReward

from captioning.batches import BatchMaker, pack_captions
from captioning.cider import CiderReward
from captioning.consensus import Consensus, pick_best, regression_images
from captioning.dataset import EOS, PAD, SOS, UNK, CaptionSet, Tokens, Vocabulary, build_vocabulary
from captioning.decoders import Decoder, build_decoder
from captioning.decoding import Ensemble, Hypothesis, beam_search, sample
from captioning.encoders import EncoderSpec
from captioning.evaluation import EvalContext
from captioning.modes.test import by_consensus
from captioning.registry import DECODERS
from captioning.scst import SelfCritic

WORDS = [f"w{n}" for n in range(30)]


@pytest.fixture(scope="module")
def data() -> CaptionSet:
    """Twelve images with one to five captions of words that are common and rare."""
    random = np.random.default_rng(0)
    counts = random.integers(1, 6, 12)
    texts = [(30 * random.random(random.integers(1, 12)) ** 2).astype(np.int32) for _ in range(counts.sum())]
    tokens = Tokens(WORDS, np.concatenate(texts), np.concatenate([[0], np.cumsum([len(text) for text in texts])]))
    splits = {"train": np.arange(10), "val": np.array([10]), "test": np.array([11])}
    first = np.concatenate([[0], np.cumsum(counts)])
    return CaptionSet(Path(), [f"{n}.jpg" for n in range(12)], first, tokens, splits, "lists", Path("captions.txt"))


def flat(texts) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all words of the texts, and where each text begins."""
    ids = [WORDS.index(word) for text in texts for word in text]
    return np.array(ids), np.concatenate([[0], np.cumsum([len(text) for text in texts])])


def test_the_reward_is_pycocoevalcaps(data):
    random = np.random.default_rng(1)
    images = random.choice(data.splits["train"], 60)
    texts = []
    for number, image in enumerate(images):
        own = data.references(image)[0].split()
        texts.append([own, own[:2], random.permutation(own).tolist(), own + own, [], ["w29", "w28", "w29"]][number % 6])
    ids, offsets = flat(texts)
    ours = CiderReward(data, data.splits["train"]).score(ids, offsets, images)
    theirs = CocoReward(data, data.splits["train"]).score([" ".join(text) for text in texts], images)
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


def test_cider_to_a_mixture_is_linear_and_of_one_caption_its_ciderd(data):
    reward = CiderReward(data, data.splits["train"])
    lone = int(np.flatnonzero(np.diff(data.first_caption[:11]) == 1)[0])  # an image with one caption
    (own,) = ([WORDS.index(word) for word in text.split()] for text in data.references(lone))
    assert len(own) > 2
    texts = [own, own[::-1], [*own[1:], own[0]]]  # as long, and no word more often: CIDEr-D clips and fines nothing
    ids, offsets = np.concatenate(texts), np.arange(4) * len(own)
    alone = reward.cider_to_mixture(ids, offsets, np.array([lone]), np.ones(1))
    assert np.abs(alone - reward.score(ids, offsets, np.full(3, lone))).max() < 1e-9 and alone[0] == pytest.approx(10)
    several = np.array([7, lone, 2])
    parts = [reward.cider_to_mixture(ids, offsets, several[[n]], np.ones(1)) for n in range(3)]
    mixed = reward.cider_to_mixture(ids, offsets, several, np.array([0.5, 2.0, -0.25]))
    assert np.abs(mixed - (0.5 * parts[0] + 2 * parts[1] - 0.25 * parts[2])).max() < 1e-9
    nowhere = reward.cider_to_mixture(np.array([len(WORDS)]), np.array([0, 1]), np.array([lone]), np.ones(1))
    assert nowhere == 0  # a word that no caption has, and an end that all have


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


def hypothesis(data: CaptionSet, text: str, log_probability: float) -> Hypothesis:
    known = build_vocabulary(data, 1).id_of
    return Hypothesis([known[word] for word in text.split()], log_probability, log_probability, None, [])


def choose(consensus: Consensus, found: list[list[Hypothesis]], weight: float = 0.0) -> list[Hypothesis]:
    return pick_best(found, consensus.evidence(np.array([10]), found), weight)


def test_consensus_weighs_the_beam_by_its_probability(data):
    consensus = Consensus(data, build_vocabulary(data, 1), None)
    likely, lone = "w9 w3 w4", "w1 w2 w5"
    found = [[hypothesis(data, lone, -4.0), hypothesis(data, likely, -4.5), hypothesis(data, likely + " w6", -4.6)]]
    assert choose(consensus, found) == [found[0][1]]  # two that agree outweigh the likeliest
    found[0][0] = found[0][0]._replace(log_probability=0.0)
    assert choose(consensus, found) == [found[0][0]]  # but not one that has nearly all


class Means:
    """Features of twelve images: the nearer two numbers, the more alike."""

    def gather(self, images: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
        angles = torch.from_numpy(np.asarray(images)).float() * 0.4
        return torch.stack([angles.cos(), angles.sin()], 1) + 5  # the offset is what centring takes away


class Mirrored(Means):
    def gather(self, images: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
        return super().gather(images) * torch.tensor([1.0, -1.0])


def test_consensus_uses_what_the_regression_expects(data):
    consensus = Consensus(data, build_vocabulary(data, 1), [Means()])
    expected_caption = " ".join(data.references(9)[0].split()[:40])
    assert len(expected_caption.split()) > 1
    found = [[hypothesis(data, "w1 w2 w5", -4.0), hypothesis(data, expected_caption, -4.2)]]
    assert choose(consensus, found) == [found[0][0]]
    assert choose(consensus, found, 8.0) == [found[0][1]]
    consensus.views = []
    assert choose(consensus, found, 8.0) == [found[0][0]]


@pytest.mark.parametrize("known", [True, False])
def test_the_regressions_weight_is_what_helps_on_the_validation_images(data, monkeypatch, known):
    vocabulary = build_vocabulary(data, 1)
    consensus = Consensus(data, vocabulary, [Means()])
    expected_caption = " ".join(data.references(9)[0].split()[:40])
    found = [hypothesis(data, "w1 w2 w5", -4.0), hypothesis(data, expected_caption, -4.2)]
    asked: list[int] = []
    task = EvalContext(argparse.Namespace(beam_size=7), torch.device("cpu"), data, vocabulary, [], consensus=consensus)

    def search(_, images: np.ndarray, beam: int, wanted: int) -> list[list[Hypothesis]]:
        asked.extend(images.tolist())
        assert beam == wanted == 7
        return [found for _ in images]

    monkeypatch.setattr("captioning.modes.test.search", search)
    images = np.array([10] if known else [11])
    for good, weighty in zip(found, (False, True), strict=True):  # without the regression the first is picked
        right = [task.text(good)]
        monkeypatch.setattr(
            "captioning.consensus.cider_of_each", lambda captions, _, right=right: np.array([captions == right])
        )
        picked, weight = by_consensus(task, images, [found])
        assert picked == [good] and (weight > 0) == weighty  # the smaller weight where two are equal
    assert asked == ([] if known else [10, 10])


def test_the_regression_is_ridge_regression(data, monkeypatch):
    consensus = Consensus(data, build_vocabulary(data, 1), [Means()])
    assert consensus.regress(np.array([10, 11])).shape == (2, 10)
    assert consensus.regress(np.array([10]))[0].argmax() == 9  # the nearest training image
    features = Means().gather(np.arange(12)).double()
    known = torch.nn.functional.normalize(features - features[:10].mean(0))
    kernel = (known @ known.T - 1).exp().numpy()
    targets = np.random.default_rng(0).normal(size=(10, 3))
    weights = np.linalg.inv(kernel[:10, :10] + 0.1 * np.eye(10)) @ targets
    assert np.abs(consensus.regress(np.arange(12)) @ targets - kernel[:, :10] @ weights).max() < 1e-9
    monkeypatch.setattr("captioning.consensus.RIDGE", 1e-12)
    assert np.abs(consensus.regress(np.arange(10)) - np.eye(10)).max() < 0.01  # what it was fitted to, it repeats


def test_the_regression_sees_the_mean_of_the_views(data):
    class Both(Means):
        def gather(self, images: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
            return (Means().gather(images) + Mirrored().gather(images)) / 2

    vocabulary = build_vocabulary(data, 1)
    two, one = Consensus(data, vocabulary, [Means(), Mirrored()]), Consensus(data, vocabulary, [Both()])
    expected, whole = one.regress(np.array([10])), Consensus(data, vocabulary, [Means()]).regress(np.array([10]))
    found = two.regress(np.array([10]))
    assert np.abs(found - expected).max() < 1e-6 and np.abs(found - whole).max() > 0.01


def test_of_very_many_images_the_regression_takes_some(data, monkeypatch):
    monkeypatch.setattr("captioning.consensus.REGRESSION_IMAGES", 4)
    consensus = Consensus(data, build_vocabulary(data, 1), [Means()])
    assert len(set(consensus.fitted)) == 4 and set(consensus.fitted) <= set(range(10))
    assert (consensus.fitted == regression_images(data.splits["train"])).all()
    assert consensus.regress(np.array([10])).shape == (1, 4)
    found = [[hypothesis(data, "w1 w2 w5", -4.0), hypothesis(data, "w9 w3", -4.2)]]
    assert choose(consensus, found, 8.0)[0] in found[0]


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
    expected, _ = Ensemble([(decoder, features)]).step(torch.tensor([SOS]))
    share = np.bincount(drawn.words[:, 0], minlength=7) / 4000
    assert share[[PAD, SOS, UNK]].sum() == 0
    allowed = expected[0].detach().exp() / expected[0].detach().exp().sum()
    assert np.abs(share - allowed.numpy()).max() < 0.03


def test_the_nucleus_keeps_the_likeliest_words():
    decoder = small("lstm", 40)
    drawn = sample(decoder, torch.randn(5, 8), 3, 6, top_p=1e-6)
    greedy = [found[0].ids for found in beam_search([(decoder, torch.zeros(1, 8))], 1, 6)]
    assert len(greedy) == 1
    rows = drawn.words.reshape(5, 3, -1)
    assert (rows == rows[:, :1]).all()  # one word has it all: the three samples are the greedy caption


def test_samples_end_and_say_so():
    decoder = small("attention", 9)
    drawn = sample(decoder, torch.randn(6, 49, 8), 5, 12)
    for words, length, ended, _ in zip(*drawn, strict=True):
        assert (words[length:] == EOS).all() and EOS not in words[:length] and ended == (length < 12)


@pytest.mark.parametrize("kind", DECODERS)
def test_samples_know_their_log_probability(kind):
    decoder = small(kind, 9)
    features = torch.randn(2, *((49, 8) if decoder.uses_grid else (8,)))
    drawn = sample(decoder, features, 2, 12, top_p=0.8)
    decoder.eval()
    for row, (words, length, ended, log_probabilities) in enumerate(zip(*drawn, strict=True)):
        ensemble, word, expected = Ensemble([(decoder, features[row // 2 : row // 2 + 1])]), torch.tensor([SOS]), []
        for target in [*words[:length].tolist(), *([EOS] if ended else [])]:
            known, _ = ensemble.step(word)
            expected, word = [*expected, known[0, target].item()], torch.tensor([target])
        assert log_probabilities[: len(expected)] == pytest.approx(expected, abs=1e-4)
        assert not log_probabilities[len(expected) :].any()


def test_a_batch_of_samples_is_packed_as_captions_are(data):
    vocabulary = build_vocabulary(data, 1)
    batches = BatchMaker(data, vocabulary, 40)
    plain = batches.make(np.arange(9))
    words = np.concatenate([batches.lookup[data.tokens.ids], [EOS]])
    owner = np.searchsorted(data.first_caption, np.arange(9), side="right") - 1
    again, _ = pack_captions(words, data.tokens.offsets[:9], np.diff(data.tokens.offsets)[:9], owner)
    for field in ("row_image", "inputs", "targets", "batch_sizes", "token_row", "slots"):
        assert torch.equal(getattr(plain, field), getattr(again, field)), field


@pytest.mark.parametrize("kind", DECODERS)
def test_the_gradient_is_that_of_the_written_out_formula(data, kind):
    """Against log-probabilities of the samples, taken word by word through `step`."""
    vocabulary = build_vocabulary(data, 1)
    decoder = small(kind, len(vocabulary)).eval()
    decoder.dropout.probability = 0.0
    images = np.array([2, 5, 7])
    features = torch.randn(3, *((49, 8) if decoder.uses_grid else (8,)))
    critic = SelfCritic(data, vocabulary, 4, 10)
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


def test_an_ensemble_of_one_decoder_twice_is_that_decoder():
    decoder, features = small("attention", 20).eval(), torch.randn(4, 49, 8)
    alone = beam_search([(decoder, features)], 3, 8)
    twice = beam_search([(decoder, features), (decoder, features)], 3, 8)
    for one, two in zip(alone, twice, strict=True):
        assert [h.ids for h in one] == [h.ids for h in two]
        assert one[0].log_probability == pytest.approx(two[0].log_probability, abs=1e-5)


def test_views_of_one_decoder_run_as_one_batch_and_change_nothing():
    decoder, other = small("attention", 20), small("lstm", 20)
    torch.manual_seed(1)
    views = torch.randn(3, 9, 49, 8)
    decoder.output_bias.data[EOS] = 1
    decoder.embed.weight.data *= 6
    means, rows = (other, 5 * views[0].mean(1)), []
    counted = decoder.output.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    shared = beam_search([*((decoder, view) for view in views), means], 4, 12, attention=True, num_hypotheses=4)
    counted.remove()
    assert rows[:2] == [27, 108] and rows[-1] < 108  # 3 views of 9 images, of which some finish first
    copies = [(copy.deepcopy(decoder), view) for view in views]
    alone = beam_search([*copies, means], 4, 12, attention=True, num_hypotheses=4)
    for one, two in zip(shared, alone, strict=True):
        assert [h.ids for h in one] == [h.ids for h in two]
        for first, second in zip(one, two, strict=True):
            assert first.score == pytest.approx(second.score, abs=1e-5)
            np.testing.assert_allclose(first.attention, second.attention, atol=1e-5)


def test_an_ensemble_means_probabilities():
    members = [(small(kind, 9).eval(), torch.randn(2, 49, 8)) for kind in DECODERS]
    members = [(decoder, grid if decoder.uses_grid else grid.mean(1)) for decoder, grid in members]
    words = torch.full((2,), SOS)
    together, _ = Ensemble(members).step(words)
    each = [Ensemble([member]).step(words)[0].exp() for member in members]
    torch.testing.assert_close(together.exp(), torch.stack(each).mean(0), atol=1e-6, rtol=1e-5)
    assert together[0].exp().sum() < 1  # <PAD>, <SOS> and <UNK> are never written
    found = beam_search(members, 3, 8)
    for image in range(2):
        (alone,) = beam_search([(decoder, features[image : image + 1]) for decoder, features in members], 3, 8)
        assert [h.ids for h in alone] == [h.ids for h in found[image]]
