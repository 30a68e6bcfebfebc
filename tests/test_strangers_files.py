"""Bad data and strangers' files, one oddity at a time; `test_fuzz.py` mixes them."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from fuzz_targets import checkpoint_records, sound_checkpoint, zipped
from safetensors.torch import save

from captioning.config.registry import LIMITS
from captioning.data.dataset import load_caption_set, tokenize_cached
from captioning.data.layouts import read_captions
from captioning.data.splits import find_splits
from captioning.encoders.base import load_encoder_weights
from captioning.io import UserError
from captioning.runs.checkpoints import load_checkpoint


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
        ("a.jpg,dog #1\truns", "a.jpg", "dog #1 runs"),
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


@pytest.mark.parametrize(
    "document",
    ["[" * 100_000, "[]", '{"images": [3]}', '{"images": [{"filename": ["a"], "split": "train", "sentences": [{"raw": "a"}]}]}'],
)  # fmt: skip
def test_karpathy_files_of_another_shape(tmp_path, document):
    with pytest.raises(UserError):
        captions(tmp_path, document, "dataset.json")
    with pytest.raises(UserError):
        find_splits([tmp_path], ["a.jpg"], [1], 0, None, [])


def test_duplicates_and_long_captions_are_counted(tiny):
    with open(tiny / "captions.txt", "a") as file:
        file.write("p00.jpg,A red picture number one .\np00.jpg,dog\np01.jpg," + "word " * 10_000 + "\n")
    data = load_caption_set(tiny)
    assert "1 caption(s) that their image has already, kept" in data.notes
    assert any(note.startswith("1 caption(s) of more than 100 words") for note in data.notes)
    assert len(data.references(0)) == 4 and len(data.references(1)[2].split()) == 10_000


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
    refused(tmp_path, pickle.dumps(sound_checkpoint()), "cannot be read")
    whole = saved(sound_checkpoint())
    refused(tmp_path, whole[: len(whole) // 2], "cannot be read as a checkpoint")
    refused(tmp_path, saved({"weights": torch.zeros(3)}), "not a checkpoint of this program")
    for schema in (4, 99, True, torch.zeros(3)):
        refused(tmp_path, saved(sound_checkpoint() | {"schema": schema}), "another version .* export it again")


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


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("epoch", "1", "epoch is a str where a whole number"),
        ("epoch", True, "epoch is a bool"),
        ("flags.decoder", "gpt", "flags.decoder is a str where a value that --decoder takes"),
        ("vocabulary", ["<PAD>", "a"], "begins with <PAD>"),
        ("vocabulary", ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a", "a"], "different words"),
        ("vocabulary", ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a", "\x1b[2J"], "vocabulary is a list"),
        ("vocabulary", ["<PAD>", "<SOS>", "<EOS>", "<UNK>", "a"], "output_bias is .6. rather than .5."),
        ("decoder.embed.weight", torch.zeros(6, 3, dtype=torch.float64), "float32"),
        ("decoder.embed.weight", torch.full((6, 3), torch.nan), "finite"),
        ("decoder.embed.weight", torch.zeros(3, 6).T, "a table of float32 tensors"),
        ("decoder.embed.weight", torch.zeros(()).expand(10**6, 10**6), "a table of float32 tensors"),
        ("decoder.more", torch.zeros(6), "more is .6. rather than absent"),
        ("flags.hidden_size", 3, "another architecture .* lstm.weight_ih_l0 is .8, 3. rather than .12, 3."),
        ("flags.num_layers", 2, "lstm.weight_ih_l1 is absent rather than .8, 2."),
        *(
            (f"flags.{name}", high + 1, f"flags.{name} is a int where a value that --{name} takes belongs")
            for name, high in LIMITS.items()
            if name not in ("beam_size", "epochs", "length_penalty", "seed")
        ),
        ("flags.seed", 2**63, "flags.seed"),
        ("decoding", {"beam_size": 1001, "length_penalty": 1.0, "cider": 0.5, "images": 3}, "decoding.beam_size"),
        ("decoding", {"beam_size": 3, "length_penalty": 200, "cider": 0.5, "images": 3}, "from 0 to 100"),
        ("encoder.transform", "squash256", "encoder.transform is not squash224"),
        ("flags.dataset_type", "../../elsewhere", "flags.dataset_type is a str where a value that"),
        ("flags.hidden_size", None, "flags.hidden_size is a NoneType"),
        ("flags.drop_prob", float("nan"), "flags.drop_prob is a float"),
        ("flags", [], "flags lacks"),
        ("encoder", {"name": "resnet50"}, "encoder lacks"),
        ("encoder.name", "efficientnet_lite0", "another encoder"),
        ("split", {"val": "a.jpg", "test": []}, "split is a dict where a split by image name"),
        ("schedule.settings.t_max", 0, "schedule.settings.t_max"),
        ("schedule.settings.more", 0, "unknown fields"),
        ("loss_curve.epochs", [], "not equally long"),
        ("metrics_history", [3], "metrics_history"),
        ("confidence.beam.images", 1, "confidence is a dict"),
        ("best.score", float("nan"), "best.score is a float where a number"),
        ("optimizer.state", {0: {}}, "does not fit its parameter"),
        ("optimizer.state", {99: {}}, "names a parameter that is not there"),
        ("optimizer", {}, "optimizer lacks"),
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


@pytest.mark.parametrize(
    "pickled, message",
    [
        (b"cos\nsystem\n(X\2\0\0\0lstR.", "cannot be read"),
        (b"\x80\2s.", "cannot be read"),
        (b"\x80\2ccollections\nOrderedDict\n)R}X\4\0\0\0keysK\1sb.", "not a checkpoint of this program"),
    ],
    ids=["code", "nothing on the stack", "an attribute over a method"],
)  # fmt: skip
def test_nothing_in_a_forged_pickle_is_executed(tmp_path, pickled, message):
    records = checkpoint_records()
    forged = {name: pickled if name.endswith("data.pkl") else raw for name, raw in records.items()}
    refused(tmp_path, zipped(forged), message)


def test_encoder_weights_are_read_with_the_same_care(tmp_path):
    network = torch.nn.Linear(2, 2)
    for name, content, message in (
        ("text", b"hello", "cannot be read as Linear weights"),
        ("other", saved({"weight": torch.zeros(2, 2)}), "bias is missing"),
        ("old_other", old_form({"weight": torch.zeros(2, 2)}), "bias is missing"),
        ("other.safetensors", save({"weight": torch.zeros(2, 2)}), "bias is missing"),
        ("text.safetensors", b"hello", "cannot be read as Linear weights"),
        ("list", saved([1, 2]), "cannot be read"),
        ("shape", saved({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}), "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            load_encoder_weights(network, tmp_path / name)
        assert "\n" not in str(error.value)
    state = network.state_dict()
    for name, content in (("new", saved(state)), ("old", old_form(state)), ("new.safetensors", save(state))):
        (tmp_path / name).write_bytes(content)
        again = torch.nn.Linear(2, 2)
        load_encoder_weights(again, tmp_path / name)
        assert torch.equal(again.weight, network.weight)


# --------------------------------------------------------------------------------------------------
# Caches


def test_a_damaged_token_cache_is_made_again(tmp_path):
    texts = ["a dog", "a cat"]
    tokens = tokenize_cached(texts, tmp_path)
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    for place in range(0, len(sound), 397):
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


def test_a_message_cannot_command_the_terminal():
    assert str(UserError("a\x1b[2J\ud800b\n- c")) == "a\\x1b[2J\\ud800b\n- c"
