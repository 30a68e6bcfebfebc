"""What leaves the device: on fake CUDA tensors, which have shapes and a device but no numbers, and need no GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captioning.config.registry import DECODERS
from captioning.data.dataset import SOS
from captioning.decoders.base import build_decoder
from captioning.decoders.ensemble import Ensemble
from captioning.encoders.base import EncoderSpec

WORDS, ROWS, MOST = 5000, 6, 7


class Leaving(TorchDispatchMode):
    """Records the shape of every tensor that an operation copies from the GPU, and of every number that Python reads."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor) and each.is_cuda]
        number = [torch.empty(())] if function is torch.ops.aten._local_scalar_dense.default else []
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor) and not each.is_cuda]
        self.shapes += [tuple(each.shape) for each in made + number if read]
        return result


@pytest.mark.parametrize("kind", DECODERS)
def test_nothing_but_the_chosen_words_leaves_the_device(kind):
    sizes = {"embed_size": 12, "hidden_size": 12, "num_layers": 1, "attention_dim": 12, "num_heads": 2}
    flags = {"decoder": kind, "drop_prob": 0.3, "max_length": 12, **sizes}
    with FakeTensorMode():
        with torch.device("cuda"):
            decoder = build_decoder(flags, WORDS, EncoderSpec("eight", 8, (0.0,) * 3, (1.0,) * 3))
            features = torch.empty(2, ROWS, *((49, 8) if decoder.uses_grid else (8,)))
        ensemble = Ensemble([(decoder, view) for view in features])  # two views
        words = torch.full((ROWS,), SOS, device="cuda")
        with Leaving() as leaving, torch.inference_mode():
            for _ in range(2):
                best, ids, alphas = ensemble.choose(words, MOST, None)
            assert leaving.shapes == []
            best.cpu(), ids.cpu()
        assert best.is_cuda and ids.is_cuda and leaving.shapes == [(ROWS, MOST)] * 2
        assert (alphas is not None) == decoder.has_attention
        assert alphas is None or (alphas.is_cuda and alphas.shape == (ROWS, 49))
