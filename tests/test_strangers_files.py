"""Bad data and strangers' files, one oddity at a time; `test_fuzz.py` mixes them."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from fuzz_targets import checkpoint_records, encoded, sound_checkpoint, zipped
from PIL import Image
from run_files import png_of
from safetensors.torch import save

from captioning import tensor_files
from captioning.checkpoints import load_checkpoint
from captioning.dataset import load_caption_set, tokenize_cached
from captioning.encoders import load_weights
from captioning.features import FeatureFile
from captioning.images import UnreadableImage, open_image
from captioning.io import UserError, read_json
from captioning.layouts import read_captions
from captioning.registry import LIMITS
from captioning.runs import find_checkpoint
from captioning.settings import config_flags, get_parser
from captioning.splits import find_splits


def captions(folder: Path, text: str | bytes, name: str = "captions.txt") -> tuple[dict[str, list[str]], list[str]]:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    table, notes = read_captions(folder / name)
    return table.groupby("image", sort=False)["caption"].agg(list).to_dict(), notes


# --------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    text = end.join(["image,caption", "ü.jpg,Ein Hund", "\U0001f415.jpg,日本語", ""])
    assert captions(tmp_path, text.encode(encoding))[0] == {"ü.jpg": ["Ein Hund"], "\U0001f415.jpg": ["日本語"]}


@pytest.mark.parametrize(
    "encoding, message",
    [("latin-1", "line 3: not utf-8.*iconv -f latin1"), ("utf-16-le", "NUL.*iconv"), ("utf-32", "NUL.*iconv")],
)
def test_other_encodings_are_refused_with_the_way_out(tmp_path, encoding, message):
    with pytest.raises(UserError, match=message):
        captions(tmp_path, "image,caption\na.jpg,dog\nb.jpg,ein süßer Hund\n".encode(encoding))


@pytest.mark.parametrize(
    "row, name, caption",
    [
        ('a.jpg,"a ""big"" dog"', "a.jpg", 'a "big" dog'),
        ('a.jpg,a "big" dog', "a.jpg", 'a "big" dog'),
        ("a.jpg,'a dog'", "a.jpg", "'a dog'"),
        ('"a.jpg","a dog, big"', "a.jpg", "a dog, big"),
        ("a.jpg,a dog, big", "a.jpg", "a dog, big"),
        ('"a, ""b"" \'c\'.jpg",dog', "a, \"b\" 'c'.jpg", "dog"),
        (" a b.jpg , dog ", "a b.jpg", " dog "),
        ("..a.jpg,dog", "..a.jpg", "dog"),
        ("a.jpg,dog", "a.jpg", "dog"),
    ],
)
def test_quoting_and_names_of_all_kinds(tmp_path, row, name, caption):
    assert captions(tmp_path, f"image,caption\n{row}\n\n")[0] == {name: [caption]}


@pytest.mark.parametrize(
    "text, message",
    [
        ('image,caption\na.jpg,fine\nb.jpg,"a dog\nc.jpg,cat\n', "line 3: unexpected end of data"),
        ('image,caption\na.jpg,"a\ndog" runs\n', "line 2: .*expected after"),
        ("caption,image\na dog, big,a.jpg\n", "line 2: expected 2 comma-separated fields"),
        ("image,caption\n../a.jpg,dog\n", "line 2: '../a.jpg' is not a plain file name"),
        ("image,caption\n..,dog\n", "line 2: '..' is not a plain file name"),
        ("image,caption\n,dog\n", "line 2: a row without an image name"),
        ('image,caption\n"a\nb.jpg",dog\n', "line 2: the image name 'a.nb.jpg' has a line break"),
        ("image,caption\na\x1b[2Jb.jpg,dog\n", "line 2: the image name .* control character"),
        (f"image,caption\n{'n' * 256},dog\n", "longer than file systems allow"),
        ("", "line 1: expected the header"),
        ("image,caption\n", "holds no captions"),
        ("image,caption\na.jpg,...\nb.jpg,\n", "holds no captions"),
        ('image,caption\na.jpg,"' + "x" * 140_000 + '"\n', "line 2: field larger than field limit"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as refused:
        captions(tmp_path, text)
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_control_characters_become_spaces_and_are_counted(tmp_path):
    text = 'image,caption\na.jpg,"a\ndog"\na.jpg,a\x1b[31m dog\x07\na.jpg,dog\nb.jpg,\nb.jpg,x\n'
    found, notes = captions(tmp_path, text)
    assert found == {"a.jpg": ["a dog", "a [31m dog ", "dog"], "b.jpg": ["x"]}
    assert [note.split()[0] for note in notes] == ["2", "1"] and "control" in notes[0] and "empty" in notes[1]


def test_surrogates_of_json_do_not_reach_a_file(tmp_path):
    document = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a \ud800 dog\0"}]}]}
    assert captions(tmp_path, json.dumps(document), "dataset.json")[0] == {"a.jpg": ["a   dog "]}


@pytest.mark.parametrize(
    "document",
    ["[" * 100_000, "[]", "3", '{"images": 3}', '{"images": [3]}', '{"images": [{"filename": ["a"], "sentences": [{"raw": "a"}]}]}'],
)  # fmt: skip
def test_karpathy_files_of_another_shape(tmp_path, document):
    with pytest.raises(UserError):
        captions(tmp_path, document, "dataset.json")


def test_a_row_of_blanks_takes_no_time(tmp_path):
    """The pattern that read these rows went through them in the third power of their length."""
    with pytest.raises(UserError, match="line 2"):
        captions(tmp_path, "image_name| n| comment\n" + " " * 50_000 + "x\n", "results.csv")


def test_a_comma_file_that_mentions_a_tab_is_no_token_file(tmp_path):
    assert captions(tmp_path, "image,caption\na.jpg,dog #1\truns\n")[0] == {"a.jpg": ["dog #1 runs"]}


def test_duplicates_and_long_captions_are_counted(tiny):
    with open(tiny / "captions.txt", "a") as file:
        file.write("p00.jpg,A red picture number one .\np00.jpg,dog\np01.jpg," + "word " * 10_000 + "\n")
    data = load_caption_set(tiny)
    assert "1 caption(s) that their image has already, kept" in data.notes
    assert any(note.startswith("1 caption(s) of more than 100 words") for note in data.notes)
    assert len(data.references(0)) == 4 and len(data.references(1)[2].split()) == 10_000


@pytest.mark.parametrize("filename", [["a.jpg"], None, 3, {}])
def test_karpathy_splits_of_another_shape(tmp_path, filename):
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [{"filename": filename, "split": "train"}]}))
    with pytest.raises(UserError, match="not a Karpathy caption file"):
        find_splits([tmp_path], ["a.jpg"], [1], 0, None, [])


# --------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize(
    "content",
    [b"", b"a text", png_of(60_000, 60_000), encoded(Image.new("RGB", (64, 64)), "JPEG")[:-200], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
    ids=["empty", "text", "bomb", "truncated", "postscript"],
)  # fmt: skip
def test_pictures_that_are_none(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match="a.jpg"):
        open_image(tmp_path / "a.jpg", at_least=8)


# --------------------------------------------------------------------------------------------------
# Checkpoints and weights


def refused(tmp_path, content: bytes, message: str) -> None:
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(tmp_path / "best.pt")
    assert "\n" not in str(error.value)


def saved(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def old_form(value: object) -> bytes:
    return saved(value, _use_new_zipfile_serialization=False)


def test_files_that_are_no_checkpoints(tmp_path):
    refused(tmp_path, b"", "cannot be read")
    refused(tmp_path, pickle.dumps(sound_checkpoint()), "not a zip file")
    refused(tmp_path, zipped(checkpoint_records(), zipfile.ZIP_DEFLATED), "records are compressed")
    refused(tmp_path, old_form(sound_checkpoint()), "not a zip file")
    whole = saved(sound_checkpoint())
    refused(tmp_path, whole[: len(whole) // 2], "cannot be read as a checkpoint")
    refused(tmp_path, saved({"weights": torch.zeros(3)}), "not a checkpoint of this program")
    refused(tmp_path, saved(sound_checkpoint() | {"schema": 99}), "schema 99")


def test_a_record_that_claims_to_be_larger_than_its_file(tmp_path):
    raw = zipped({"archive/data.pkl": b"abc"})
    claim = raw.replace(struct.pack("<II", 3, 3), struct.pack("<II", 2_000_000_000, 2_000_000_000))
    refused(tmp_path, claim, "claim to be larger")


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    """PyTorch writes checksums, and does not compare them."""
    records = checkpoint_records()
    weights = next(content for name, content in records.items() if name.endswith("data/2"))
    raw = bytearray(zipped(records))
    raw[bytes(raw).index(weights)] ^= 1
    refused(tmp_path, bytes(raw), "damaged")


def test_a_storage_that_claims_more_than_its_record(tmp_path):
    records = checkpoint_records()
    name = next(name for name in records if name.endswith("data/0"))
    refused(tmp_path, zipped(records | {name: records[name][:8]}), "cannot be read")


EXPANDED = torch.zeros(()).expand(10**6, 10**6)


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("epoch", "1", "epoch is a str where a whole number"),
        ("epoch", True, "epoch is a bool"),
        ("schema", torch.zeros(3), "schema is a Tensor"),
        ("decoder_type", "gpt", "a decoder of this program"),
        ("vocabulary", ["<PAD>", "a"], "begins with <PAD>"),
        ("vocabulary", ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a", "a"], "different words"),
        ("vocabulary", ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a", "\x1b[2J"], "vocabulary is a list"),
        ("vocabulary", ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a"], "output_bias is .6. rather than .5."),
        ("decoder", {"embed.weight": [1.0]}, "a table of float32 tensors"),
        ("decoder.embed.weight", torch.zeros(6, 3, dtype=torch.float64), "float32"),
        ("decoder.embed.weight", torch.full((6, 3), torch.nan), "finite"),
        ("decoder.embed.weight", torch.zeros(3, 6).T, "a table of float32 tensors"),
        ("decoder.embed.weight", EXPANDED, "larger than its storage"),
        ("decoder.embed.weight", torch.zeros(6, 3, device="meta"), "it names torch._utils._rebuild_meta_tensor"),
        ("decoder.more", torch.zeros(6), "more is .6. rather than absent"),
        ("flags.hidden_size", 3, "another architecture .* lstm.weight_ih_l0 is .8, 3. rather than .12, 3."),
        ("flags.num_layers", 2, "lstm.weight_ih_l1 is absent rather than .8, 2."),
        ("flags.attention_dim", 3, "key.weight is"),
        *(
            (f"flags.{name}", high + 1, f"flags.{name} is a int where a whole number, .* at most {high} belongs")
            for name, high in LIMITS.items()
            if name not in ("beam_size", "epochs", "length_penalty", "seed")
        ),
        ("flags.seed", 2**63, "flags.seed"),
        ("decoding", {"beam_size": 1001, "length_penalty": 1.0, "cider": 0.5, "images": 3}, "decoding.beam_size"),
        ("decoding", {"beam_size": 3, "length_penalty": 200, "cider": 0.5, "images": 3}, "from 0 to 100"),
        ("encoder.transform", "squash256", "encoder.transform is not squash224"),
        ("flags.dataset_type", "../../elsewhere", "flags.dataset_type is a str where one of flickr8k"),
        ("flags.data_dir", 3, "flags.data_dir is a int"),
        ("flags.max_length", -1, "at least 1"),
        ("flags", [], "flags lacks"),
        ("encoder", {"name": "resnet50"}, "encoder lacks"),
        ("encoder.name", "efficientnet_lite0", "another decoder or encoder"),
        ("split", {"val": "a.jpg", "test": []}, "split is a dict where a split by image name"),
        ("schedule.settings.t_max", 0, "schedule.settings.t_max"),
        ("schedule.settings.more", 0, "unknown fields"),
        ("schedule.plateau", {}, "schedule.plateau lacks"),
        ("loss_curve.epochs", [], "not equally long"),
        ("metrics_history", [3], "metrics_history"),
        ("confidence.beam.images", 1, "confidence is a dict"),
        ("best.score", float("nan"), "best.score is a float where a number"),
        ("optimizer.state", {0: {}}, "does not fit its parameter"),
        ("optimizer.state", {99: {}}, "names a parameter that is not there"),
        ("optimizer.param_groups", [], "of other parameters"),
        ("optimizer.param_groups", [{"params": [0]}], "not written by this program"),
    ],
)
def test_malformed_checkpoints_are_refused_when_they_are_read(tmp_path, place, value, message):
    checkpoint = sound_checkpoint()
    first, _, rest = place.partition(".")
    if first == "decoder" and rest:
        changed = {"decoder": checkpoint["decoder"] | {rest: value}}
    elif rest:
        key, _, inner = rest.partition(".")
        changed = {first: checkpoint[first] | {key: checkpoint[first][key] | {inner: value} if inner else value}}
    else:
        changed = {first: value}
    refused(tmp_path, saved(checkpoint | changed), message)


def test_heads_that_do_not_divide_the_width_are_a_malformed_checkpoint(tmp_path):
    checkpoint = sound_checkpoint("transformer")
    changed = {"flags": checkpoint["flags"] | {"num_heads": 2}}
    refused(tmp_path, saved(checkpoint | changed), "--embed_size 3 cannot be divided among --num_heads 2")


def forged(pickled: bytes) -> bytes:
    """A checkpoint's file with another pickle in it."""
    return zipped({name: pickled if name.endswith("data.pkl") else raw for name, raw in checkpoint_records().items()})


TWICE = b"".join(b"q%c0h%ch%c\x86" % (n, n, n) for n in range(40))  # a tuple that has the one before in both places
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0%cX\3\0\0\0cpu%stQ"


def tensor(items: bytes, shape: bytes, stride: bytes, key: bytes = b"0") -> bytes:
    """The pickle of a tensor of one dimension over a storage of so many items."""
    head = b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % (key, items) + b"K\0"
    return head + shape + b"\x85" + stride + b"\x85\x89ccollections\nOrderedDict\n)RtR."


BOMBS = {
    "two gigabytes for thirty bytes": (b"\x80\2cbuiltins\nbytearray\n\x8a\4\0\x94\x35\x77\x85R.", "it names builtins.bytearray"),
    "a key whose hash takes hours": (b"\x80\2}K\1\x85" + TWICE.replace(b"0h", b"h") + b"K\1s.", "a container lies in two places"),
    "a list that holds itself": (b"\x80\2]q\0h\0a.", "a container lies in two places"),
    "a tuple as a key": (b"\x80\2}K\1\x85K\1s.", "a key that is neither text nor a number"),
    "lists in lists": (b"\x80\2" + b"]" * 100_000 + b"a" * 99_999 + b".", "more than 16 deep"),
    "a set": (b"\x80\4\x8f.", "the opcode EMPTY_SET"),
    "code": (b"cos\nsystem\n(X\2\0\0\0lstR.", "it names os.system"),
    "bytes without end": (b"\x80\2X\xff\xff\xff\x7fabc", "expected 2147483647 bytes"),
    "no end": (b"\x80\2]", "pickle exhausted"),
    "nothing on the stack": (b"\x80\2s.", "cannot be read"),
    "an attribute over a method": (
        b"\x80\2ccollections\nOrderedDict\n)R}X\4\0\0\0keysK\1sb.", "sets attributes that no file of weights has"
    ),
    "a tensor larger than its record": (tensor(b"J\0\0\0\x10", b"K\1", b"K\1"), "data/0 is larger than its record"),
    "a tensor larger than its storage": (tensor(b"K\1", b"J\0\0\0\x7f", b"K\1"), "larger than its storage"),
    "a tensor beyond its storage": (tensor(b"K\2", b"K\2", b"K\3"), "larger than its storage"),
    "a tensor of a negative size": (tensor(b"K\1", b"J\xff\xff\xff\xff", b"K\1"), "larger than its storage"),
    "a storage of a negative size": (tensor(b"J\xff\xff\xff\xff", b"K\0", b"K\1"), "in an unknown form"),
    "something else than a storage": (b"\x80\2(X\6\0\0\0moduleK\1tQ.", "in an unknown form"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_forged_pickle_is_refused_before_anything_is_built(tmp_path, monkeypatch, name):
    pickled, message = BOMBS[name]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was to be loaded"))
    refused(tmp_path, forged(pickled), message)


def test_too_many_opcodes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MOST_OPCODES", 1000)
    refused(tmp_path, forged(b"\x80\2]" + b"K\1a" * 1000 + b"."), "more than 1000 opcodes")
    monkeypatch.setattr(tensor_files, "LARGEST_PICKLE", 1000)
    refused(tmp_path, forged(b"\x80\2]" + b"K\1a" * 1000 + b"."), "larger than 1000 bytes")


def test_a_file_that_python_and_pytorch_would_read_differently_is_refused(tmp_path):
    """Python finds a zip file behind anything else; PyTorch reads from the first byte on."""
    sound = zipped(checkpoint_records())
    refused(tmp_path, sound + sound, "something lies before its first record")
    refused(tmp_path, pickle.dumps(bytearray(9), 2) + sound, "not a zip file")


def test_encoder_weights_are_read_as_warily(tmp_path):
    network = torch.nn.Linear(2, 2)
    whole = old_form({})
    head = whole[: whole.rindex(b"\x80\2", 0, whole.rindex(b"\x80\2"))]  # the pickles before the content
    for name, content, message in (
        ("text", b"hello", "cannot be read as Linear weights"),
        ("deflated", zipped({"archive/data.pkl": bytes(10**6)}, zipfile.ZIP_DEFLATED), "records are compressed"),
        ("bytearray", forged(BOMBS["two gigabytes for thirty bytes"][0]), "it names builtins.bytearray"),
        ("old_bytearray", head + BOMBS["two gigabytes for thirty bytes"][0], "it names builtins.bytearray"),
        ("old_large", head + tensor(b"J\0\0\0\x10", b"K\1", b"K\1") + b"\x80\2]X\1\0\0\x000a.", "larger than the file"),
        ("old_empty", b"", "cannot be read as Linear weights"),
        ("other", saved({"weight": torch.zeros(2, 2)}), "bias is missing"),
        ("old_other", old_form({"weight": torch.zeros(2, 2)}), "bias is missing"),
        ("other.safetensors", save({"weight": torch.zeros(2, 2)}), "bias is missing"),
        ("text.safetensors", b"hello", "cannot be read as Linear weights"),
        ("list", saved([1, 2]), "cannot be read"),
        ("shape", saved({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}), "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            load_weights(network, tmp_path / name)
        assert "\n" not in str(error.value)
    state = network.state_dict()
    for name, content in (("new", saved(state)), ("old", old_form(state)), ("new.safetensors", save(state))):
        (tmp_path / name).write_bytes(content)
        again = torch.nn.Linear(2, 2)
        load_weights(again, tmp_path / name)
        assert torch.equal(again.weight, network.weight)


def test_weights_that_python_2_wrote_are_read():
    """An OrderedDict of before Python 3 is called with a list of pairs."""
    pairs = b"\x80\2ccollections\nOrderedDict\n](](U\1aK\1e](U\1bK\2ee\x85R."
    assert tensor_files.check_pickle(io.BytesIO(pairs)) == []
    with pytest.raises(tensor_files.Refused, match="neither text nor a number"):
        tensor_files.check_pickle(io.BytesIO(pairs.replace(b"U\1a", b"K\1\x85")))


# --------------------------------------------------------------------------------------------------
# Caches


@pytest.mark.parametrize(
    "line",
    [
        '["b.jpg", -1, 1, 1, 1, 1]', '["b.jpg", 2, 1, 1, 1, 1]', '["b.jpg", 1.0, 1, 1, 1, 1]', '["b.jpg", "1", 1, 1, 1, 1]',
        '["b.jpg", true, 1, 1, 1, 1]', '["b.jpg", Infinity, 1, 1, 1, 1]', '["b.jpg", NaN, 1, 1, 1, 1]', '["b.jpg", 1, 1, 1, 1]',
        '["b.jpg", 1, 1, 1, 1, 4294967296]', '["b.jpg", 1, 1, 1, 1, -1]', '[["b.jpg"], 1, 1, 1, 1, 1]', "null", "{}", "[]",
        "[" * 3000, '["' + "b" * 5000 + '", 1, 1, 1, 1, 1]', '["b.jpg", 1' + "0" * 30 + ", 1, 1, 1, 1]",
    ],
)  # fmt: skip
def test_an_impossible_line_ends_the_index(tmp_path, line):
    (tmp_path / "mean.jsonl").write_text(f'["a.jpg", 0, 1, 1, 1, 1]\n{line}\n["c.jpg", 1, 1, 1, 1, 1]\n')
    (tmp_path / "mean.000.f16").write_bytes(bytes(12))  # two rows
    file = FeatureFile(tmp_path, "mean", (3,))
    assert list(file.entries) == ["a.jpg"] and file.rows == 1 and len(file.maps()[0]) == 1


def test_rows_behind_a_gap_are_none(tmp_path):
    """Their number was the size of all files together, of which only the first can be mapped."""
    (tmp_path / "mean.jsonl").write_text('["a.jpg", 3, 1, 1, 1, 1]\n')
    (tmp_path / "mean.000.f16").write_bytes(bytes(12))
    (tmp_path / "mean.007.f16").write_bytes(bytes(600))
    assert FeatureFile(tmp_path, "mean", (3,)).entries == {}


def test_a_damaged_token_cache_is_made_again(tmp_path):
    texts = ["a dog", "a cat"]
    tokens = tokenize_cached(texts, tmp_path)
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    for place in range(0, len(sound), 97):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        again = tokenize_cached(texts, tmp_path)
        assert again.words == tokens.words
        assert (again.ids == tokens.ids).all() and (again.offsets == tokens.offsets).all()
    path.write_bytes(b"")
    assert tokenize_cached(texts, tmp_path).words == tokens.words and path.read_bytes() != b""


def test_a_token_cache_that_cannot_be_written_costs_time_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        assert tokenize_cached(["a dog"], place).words == ["a", "dog"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_no_words_at_all_are_kept_too(tmp_path):
    for _ in range(2):
        words, ids, offsets = tokenize_cached(["...", ""], tmp_path)
        assert words == [] and len(ids) == 0 and offsets.tolist() == [0, 0, 0]


# --------------------------------------------------------------------------------------------------
# JSON, --config, --model_path


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b"{", b"9" * 5000])
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match="as JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "a: [", "epochs: !!bool x", "epochs: !!timestamp x", "- 3", "epochs: !!python/name:os.system x"],
)
def test_yaml_that_is_no_config(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="--config") as error:
        config_flags(get_parser(), tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("feature_cache: [a]", "feature_cache: expected a number or a text"),
        ("use_scheduler: 'no'", "use_scheduler: expected true or false"),
        ("data_dir: {a: 1}", "data_dir: expected a number or a text"),
        ("epochs: true", "epochs: expected a number or a text"),
        ("epochs: " + "9" * 400, "epochs: "),
        ("seed: 0x" + "f" * 6000, "seed: "),
        ("help: true", "unknown flag 'help'"),
    ],
)
def test_values_that_no_flag_takes(tmp_path, capsys, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        config_flags(get_parser(), tmp_path / "x.yaml")
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_config_values_become_what_the_flag_takes(tmp_path):
    (tmp_path / "x.yaml").write_text("decoder_type: attention\nfeature_cache: 5\nuse_scheduler: true\ndata_dir:\n")
    flags, _ = config_flags(get_parser(), tmp_path / "x.yaml")
    assert flags == {"decoder": "attention", "feature_cache": "5", "use_scheduler": True}


@pytest.mark.parametrize("name", ["a**", "**", "[", "n" * 300, "a\0b", "\ud800", "n" * 300 + "/best.pt"])
def test_model_paths_that_no_file_can_have(tmp_path, name):
    with pytest.raises(UserError, match="is not there"):
        find_checkpoint(tmp_path / name)


def test_a_message_cannot_command_the_terminal():
    assert str(UserError("a\x1b[2J\ud800b\n- c")) == "a\\x1b[2J\\ud800b\n- c"
