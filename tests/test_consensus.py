"""Consensus decoding: what the regression learns, how captions are chosen, and that it comes with the checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import round_to_float16
from random_captions import WORDS, random_set
from run_files import skip_pictures

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.data.dataset import CaptionSet, Vocabulary, build_vocabulary
from captioning.decoding import consensus
from captioning.decoding.beam_search import Hypothesis
from captioning.decoding.consensus import NgramHead, direction, fit_head, frequent_ngrams, grow_head, settle_weight
from captioning.io import UserError
from captioning.runs.checkpoints import load_checkpoint, save_checkpoint
from captioning.runs.forms import check_consensus
from captioning.scoring.cider import CiderReward
from captioning.training import calibrate as validation


@pytest.fixture(scope="module")
def data() -> CaptionSet:
    return random_set(train=50, val=5, test=5)


def pooled(images: np.ndarray) -> np.ndarray:
    """The features are float32; a mean of 5 is what centring takes away."""
    return np.random.default_rng(1).normal(5, 1, (60, 7)).astype(np.float32)[images]


def tfidf(table, text: list[int]) -> np.ndarray:
    """The vector (G,) of a caption of numbers, for each length of n-grams of length one."""
    vector, first = np.zeros(sum(map(len, table.keys))), 0
    for keys, (grams, known, weights, norms) in zip(
        table.keys, table.weigh(np.array(text), np.array([0, len(text)])), strict=True
    ):
        has = known[grams.gram] >= 0
        np.add.at(vector, first + known[grams.gram[has]], weights[has] / max(norms[0], 1e-12))
        first += len(keys)
    return vector


def test_cider_to_a_vector_is_linear_and_of_one_caption_its_ciderd(data):
    reward = CiderReward(data, data.splits["train"])
    lone = int(
        np.flatnonzero((np.diff(data.first_caption) == 1) & (np.diff(data.tokens.offsets[data.first_caption]) > 2))[0]
    )
    (own,) = ([WORDS.index(word) for word in text.split()] for text in data.references(lone))
    texts = [own, own[::-1], [*own[1:], own[0]]]  # as long, and no word more often: CIDEr-D clips and fines nothing
    ids, offsets = np.concatenate(texts), np.arange(4) * len(own)
    alone = reward.cider_to_vector(ids, offsets, tfidf(reward, own))
    assert np.abs(alone - reward.score(ids, offsets, np.full(3, lone))).max() < 1e-9 and alone[0] == pytest.approx(10)
    vectors = [tfidf(reward, own), tfidf(reward, own[:2]), tfidf(reward, own[1:])]
    parts = [reward.cider_to_vector(ids, offsets, vector) for vector in vectors]
    mixed = reward.cider_to_vector(ids, offsets, 0.5 * vectors[0] + 2 * vectors[1] - 0.25 * vectors[2])
    assert np.abs(mixed - (0.5 * parts[0] + 2 * parts[1] - 0.25 * parts[2])).max() < 1e-9
    unknown = reward.cider_to_vector(np.array([len(WORDS)]), np.array([0, 1]), vectors[0])
    assert unknown == 0  # a word that no caption has, and an end that all have


def test_the_table_has_the_frequent_ngrams_with_the_rewards_weights(data, monkeypatch):
    """With every n-gram in it the targets are the captions' own vectors; else the rare ones are left out."""
    monkeypatch.setattr(consensus, "FEWEST_IMAGES", 1)
    train, vocabulary = data.splits["train"], build_vocabulary(data, 1)
    keys, idf, pairs, weights = frequent_ngrams(data, vocabulary, train)
    reward = CiderReward(data, train)
    assert [len(each) for each in keys] == [len(each) for each in reward.keys]
    assert all(np.allclose(np.sort(ours), np.sort(its)) for ours, its in zip(idf, reward.idf, strict=True))
    ngrams = sum(map(len, keys))
    targets = np.bincount(pairs, weights, len(train) * ngrams).reshape(len(train), ngrams)
    head = NgramHead(len(vocabulary), stored(keys, idf, np.log(len(train))))
    for image in (0, 7, 31):
        texts = [[vocabulary.id_of[word] for word in text.split()] for text in data.references(image)]
        assert np.allclose(targets[image], np.mean([tfidf(head.table, text) for text in texts], 0), atol=1e-6)
    monkeypatch.setattr(consensus, "FEWEST_IMAGES", 5)
    small = Vocabulary(vocabulary.words[:20])
    fewer = frequent_ngrams(data, small, train)[0]
    said = {word for image in train for text in data.references(image) for word in text.split()}
    images_with = {word: sum(word in " ".join(data.references(i)).split() for i in train) for word in said}
    expected = sorted(small.id_of[word] for word in said if word in small.id_of and images_with[word] >= 5)
    assert fewer[0].tolist() == [*expected, len(small)]  # the end of a caption is a word too


def stored(keys, idf, log_images: float, channels: int = 7, rank: int = 2) -> dict:
    ngrams = sum(map(len, keys))
    return {
        "keys": np.concatenate(keys), "idf": np.concatenate(idf).astype(np.float32),
        "sizes": np.array([len(each) for each in keys]), "centre": np.zeros(channels, np.float32),
        "project": np.zeros((channels + 1, rank), np.float32), "expect": np.zeros((rank, ngrams), np.int8),
        "units": np.ones(rank, np.float32),
        "log_images": float(log_images), "weight": 0.0,
    }  # fmt: skip


def test_the_regression_is_reduced_rank_ridge_regression(data, monkeypatch):
    """Against the textbook: ridge regression, then the principal directions of what it predicts."""
    monkeypatch.setattr(consensus, "FEWEST_IMAGES", 2)
    monkeypatch.setattr(consensus, "FIT_BATCH", 16)
    train, vocabulary = data.splits["train"], build_vocabulary(data, 1)
    keys, _, pairs, weights = frequent_ngrams(data, vocabulary, train)
    ngrams = sum(map(len, keys))
    targets = np.bincount(pairs, weights, len(train) * ngrams).reshape(len(train), ngrams)
    centre = pooled(train).mean(0, dtype=np.float64).astype(np.float32)
    x, queries = (direction(pooled(images), centre).astype(np.float64) for images in (train, np.arange(50, 60)))
    ridge = np.linalg.solve(x.T @ x + consensus.RIDGE * np.eye(8), x.T @ targets)
    full = fit_head(data, vocabulary, pooled).expected(pooled(np.arange(50, 60)))
    near = np.abs(queries @ ridge).max() / 100  # it is stored in eight bits
    assert np.abs(full - queries @ ridge).max() < near
    monkeypatch.setattr(consensus, "RANK", 3)
    head = fit_head(data, vocabulary, pooled)
    assert head.stored["expect"].shape == (3, ngrams)
    predicted = np.vstack([x, np.sqrt(consensus.RIDGE) * np.eye(8)]) @ ridge  # the ridge as eight more images
    _, _, directions = np.linalg.svd(predicted, full_matrices=False)
    expected = queries @ ridge @ directions[:3].T @ directions[:3]
    assert np.abs(head.expected(pooled(np.arange(50, 60))) - expected).max() < near


def hypothesis(vocabulary: Vocabulary, text: str, log_probability: float) -> Hypothesis:
    return Hypothesis([vocabulary.id_of[word] for word in text.split()], log_probability, log_probability, None, [])


def test_the_evidence_is_the_beams_agreement_and_what_is_expected(data, monkeypatch):
    monkeypatch.setattr(consensus, "FEWEST_IMAGES", 1)
    vocabulary = build_vocabulary(data, 1)
    head = fit_head(data, vocabulary, pooled)
    likely, lone = "w9 w3 w4", "w1 w2 w5"
    found = [[hypothesis(vocabulary, *each) for each in ((lone, -4.0), (likely, -4.5), (f"{likely} w6", -4.6))]]
    (by_beam, by_regression), *_ = head.evidence(found, pooled(np.array([50])))
    assert by_beam.argmax() == 1  # two that agree outweigh the likeliest
    certain = [[found[0][0]._replace(log_probability=0.0), *found[0][1:]]]
    assert head.evidence(certain, pooled(np.array([50])))[0][0].argmax() == 0  # but not one that has nearly all
    vector = head.expected(pooled(np.array([50])))[0].astype(np.float64)
    for each, value in zip(found[0], by_regression, strict=True):
        assert value == pytest.approx(10 / 4 * vector @ tfidf(head.table, each.ids), abs=1e-5)


def test_a_head_says_the_same_with_more_words(data, monkeypatch):
    monkeypatch.setattr(consensus, "FEWEST_IMAGES", 1)
    vocabulary = build_vocabulary(data, 1)
    head, known = fit_head(data, vocabulary, pooled), len(vocabulary)
    grown = grow_head(head.stored, known, known + 3)
    check_consensus(grown, known + 4, 7, Path("grown.pt"))
    found = [[hypothesis(vocabulary, text, -len(text)) for text in ("w9 w3 w4", "w1 w2 w5", "w9 w3 w4 w6", "w1")]]
    before, after = (each.evidence(found, pooled(np.array([50]))) for each in (head, NgramHead(known + 3, grown)))
    assert all(np.allclose(a, b, atol=1e-12) for a, b in zip(before[0], after[0], strict=True))
    assert before[0][1].any()


@pytest.mark.parametrize("right, expected", [("first", 0.0), ("second", 10.0), ("never", 0.0)])
def test_the_weight_is_what_helps_on_the_validation_images(data, monkeypatch, right, expected):
    """One image hardly moves it from what it is without any; a regression that gains nothing gets none."""
    vocabulary = build_vocabulary(data, 1)
    head = fit_head(data, vocabulary, pooled)
    found = [[hypothesis(vocabulary, "w1", -4.0), hypothesis(vocabulary, "w2", -4.2)]]
    monkeypatch.setattr(NgramHead, "evidence", lambda *_: [(np.array([3.0, 0.0]), np.array([0.0, 1.0]))])
    chosen = {"first": "w1", "second": "w2", "never": "w3"}[right]
    monkeypatch.setattr(consensus, "cider_of_each", lambda captions, _: np.array([captions == [chosen]], dtype=float))
    text = lambda each: " ".join(vocabulary.decode(each.ids))  # noqa: E731
    assert settle_weight(head, found, pooled(np.array([50])), text, [["w1"]])[0].weight == pytest.approx(
        expected, rel=0.01
    )


@pytest.fixture(scope="module")
def run(tiny_runs, tmp_path_factory) -> Path:
    """A run with attention whose checkpoint has learned consensus by `--mode tune`, as one of an earlier version would."""
    folder = shutil.copytree(tiny_runs["attention"], tmp_path_factory.mktemp("consensus") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setattr(validation, "FEWEST_TRAINING_IMAGES", 1)
        patch.setattr(validation, "FEWEST_VALIDATION_IMAGES", 1)
        patch.setattr(consensus, "FEWEST_IMAGES", 2)
        patch.setattr(consensus, "WEIGHTS", np.array([4.0]))
        patch.setattr(consensus, "PRIOR_IMAGES", 0)
        patch.setattr("captioning.modes.tune.BEAMS", (1, 2))
        assert load_checkpoint(folder / "best.pt")["consensus"] is None
        assert trainer.main(["--mode", "tune", "--model_path", str(folder)]) == 0
    assert load_checkpoint(folder / "best.pt")["consensus"]["weight"] == 4.0
    round_to_float16(folder / "best.pt")
    return folder


def test_test_and_caption_choose_the_same_captions(run, tiny_runs, monkeypatch, capsys):
    """An exported folder does too: tests/test_every_decoder.py."""
    monkeypatch.chdir(run.parent)
    skip_pictures(monkeypatch)
    assert trainer.main(["--mode", "test", "--model_path", str(run)]) == 0
    printed = capsys.readouterr().out
    greedy, beam, chosen = json.loads((run / "test_metrics.json").read_text())[-3:]
    assert [row["beam_size"] for row in (greedy, beam, chosen)] == [1, 20, 20]
    assert [row["consensus"] for row in (greedy, beam, chosen)] == [None, None, "regression"]
    assert chosen["consensus_weight"] == 4.0 and "consensus" in printed
    known = {row["image_id"]: row["caption"] for row in json.loads((run / chosen["captions_file"]).read_text())}
    plain = {row["image_id"]: row["caption"] for row in json.loads((run / beam["captions_file"]).read_text())}
    assert known != plain
    capsys.readouterr()
    folder = tiny_runs["data"] / "Images"
    likeliest = ["--consensus", "off", "--beam_size", "20", "--length_penalty", str(beam["length_penalty"])]
    for flags, expected in (([], known), (likeliest, plain)):
        images = [str(folder / name) for name in known]
        assert trainer.main(["--mode", "caption", "--model_path", str(run), "--images", *images, *flags]) == 0
        lines = dict(line.split("\t")[:2] for line in capsys.readouterr().out.splitlines())
        assert {Path(path).name: text for path, text in lines.items()} == expected, flags


def test_an_ensemble_of_which_one_has_no_consensus_is_a_plain_one(run, tiny_runs, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    skip_pictures(monkeypatch)
    models = [str(run), str(shutil.copytree(tiny_runs["attention"], run.parent / "other"))]
    assert trainer.main(["--mode", "test", "--model_path", *models]) == 0
    assert [row["beam_size"] for row in json.loads((run / "ensemble_metrics.json").read_text())][-1] != 20
    assert trainer.main(["--mode", "test", "--model_path", *models, "--consensus", "on"]) == 2
    error = capsys.readouterr().err
    assert f"{models[1]}/best.pt has nothing for --consensus" in error and "--mode tune" in error


@pytest.mark.parametrize(
    "damage",
    [
        {"sizes": np.array([1, 1, 1, 1])}, {"keys": None}, {"centre": np.zeros(3, np.float32)}, {"log_images": "x"},
        {"expect": np.zeros((2, 2), np.float32)}, {"units": np.full(2, np.inf, np.float32)}, {"idf": torch.zeros(2)}, {"weight": float("nan")},
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused(run, tmp_path, damage):
    checkpoint = load_checkpoint(run / "best.pt")
    stored = dict(checkpoint["consensus"])
    if damage == {"keys": None}:
        damage = {"keys": stored["keys"][::-1].copy()}
    save_checkpoint(tmp_path / "best.pt", checkpoint | {"consensus": stored | damage})
    with pytest.raises(UserError, match="consensus"):
        load_checkpoint(tmp_path / "best.pt")
