"""The loss of one training step, whole or shared out among processes, and that of the validation images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distributed
from caption_data import Batch, BatchMaker
from caption_models import LSTMDecoder
from feature_cache import DeviceFeatures, Features, gather_views
from safe_io import UserError, format_bytes, log
from self_critical import SelfCritic
from training_utils import Precision

MAX_BAD_BATCHES = 10  # in an epoch, whose loss or gradient is no finite number


class Share(NamedTuple):
    """What one process does of a step: all of it where it is alone."""

    batch: Batch | None  # its images' captions; None where there are fewer images than processes
    views: np.ndarray  # int64 (I,) the view of each of its images
    tokens: int  # of the whole step
    captions: int  # of the whole step


def take_share(batches: BatchMaker, captions: np.ndarray, views: int, seeds: list[int]) -> Share:
    """This process's part of a step's captions: whole images, with about as many tokens as everybody's.

    Args:
        captions: numbers (R,) of all captions of the step.
        views: how many there are; which one an image is seen in does not depend on the number of processes.
        seeds: of this step's random numbers.
    """
    images, image_of = np.unique(batches.owner(captions), return_inverse=True)
    tokens = batches.lengths[captions] + 1  # the words and <EOS>
    drawn = np.random.default_rng(seeds).integers(views, size=len(images))
    mine = np.ones(len(images), dtype=bool)
    if distributed.size() > 1:
        mine = distributed.deal(np.bincount(image_of, tokens), distributed.size()) == distributed.rank()
    batch = batches.make(captions[mine[image_of]]) if mine.any() else None
    return Share(batch, drawn[mine], int(tokens.sum()), len(captions))


class StepLoss(nn.Module):
    """From a share of a step to the loss whose gradient moves the decoder.

    A module, so that PyTorch's `DistributedDataParallel` can be put around it. That takes the mean of the
    processes' gradients; each process's loss is its part of the sum over all tokens, times their number, so
    that the mean is the gradient that one process would have found.
    """

    def __init__(self, decoder: LSTMDecoder, critic: SelfCritic | None, args: argparse.Namespace, precision: Precision):
        super().__init__()
        self.decoder, self.critic, self.args, self.precision = decoder, critic, args, precision

    def forward(
        self, share: Share, views: list[Features], device: torch.device, self_critical: bool
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Returns the loss to go back from, this process's part of the step's loss per token, and the mean reward."""
        loss, reward = torch.zeros((), device=device), 0.0
        features = None
        if share.batch is not None:
            features = gather_views(views, share.batch.images, share.views, device)  # (I, 49, C) or (I, C)
        if self_critical and self.critic is not None:
            images = share.batch.images if share.batch is not None else np.zeros(0, dtype=np.int64)
            loss, reward = self.critic.loss(self.decoder, features, images, self.precision.autocast())
        weight = self.args.scst_ce_weight if self_critical else 1.0
        if weight and share.batch is not None and features is not None:
            loss = loss + weight * self.cross_entropy(features, share.batch.to(device), share)
        part = loss.detach()
        if share.batch is None:  # every parameter needs a gradient, if only of zeros
            loss = loss + sum(parameter.sum() * 0 for parameter in self.decoder.parameters())
        return loss * distributed.size(), part, reward

    def cross_entropy(self, features: torch.Tensor, batch: Batch, share: Share) -> torch.Tensor:
        """The loss per token of people's captions, with what the flags add to it."""
        with self.precision.autocast():
            output = self.decoder(features, batch)
            loss = self.decoder.cross_entropy(output.code, batch.targets, self.args.label_smoothing) / share.tokens
            if self.args.attention_reg and output.attention is not None:
                # Doubly stochastic attention (Xu et al., 2015, section 4.2.1): every region is looked at once in all.
                looked = output.attention.new_zeros(len(batch.row_image), output.attention.shape[1])
                looked = looked.index_add(0, batch.token_row, output.attention)  # (R, 49)
                loss = loss + self.args.attention_reg * ((1 - looked) ** 2).mean(1).sum() / share.captions
        return loss


def shared_out(step_loss: StepLoss) -> nn.Module:
    """The same with its gradients meaned over all processes, where there are several."""
    if distributed.size() == 1:
        return step_loss
    # Without device_ids, with which it would move the batch's sizes to the GPU too.
    return DistributedDataParallel(step_loss)


def report_bad_batch(where: str, bad: int, directory: Path, args: argparse.Namespace) -> None:
    """Name a batch that was skipped, the `bad`th of its epoch.

    Raises:
        UserError: it is one too many.
    """
    if bad > MAX_BAD_BATCHES:
        raise UserError(
            f"{where} is the {bad}th of this epoch whose loss or gradient is not a finite number. The weights in "
            f"{directory} are good: train on from them with a lower --learning_rate (now {args.learning_rate:g}) "
            f"or a smaller --grad_clip, e.g. --model_path {directory / 'last.pt'} --learning_rate {args.learning_rate / 10:g}"
        )
    log.warning(f"\nSkipped {where}: its loss or gradient is not a finite number ({bad} of at most {MAX_BAD_BATCHES})")


def advise_on_memory(device: torch.device, args: argparse.Namespace, directory: Path, views: Sequence[Features]) -> str:
    """What to do after a GPU's memory ran out: which flag, and a value that needs less.

    A step's memory grows with the captions in it, so that half of them take about half of what is not weights.
    """
    smaller = max(1, args.batch_size // 2)
    copies = [view.rows for view in views if isinstance(view, DeviceFeatures)]
    size = sum(rows.numel() * rows.element_size() for rows in copies)
    spent = f" (at its peak {format_bytes(torch.cuda.max_memory_allocated())})" if device.type == "cuda" else ""
    return (
        f"the memory of {device} ran out{spent} in a step of --batch_size {args.batch_size}. A step of half as many captions "
        f"takes about half: go on from the last save with --model_path {directory / 'last.pt'} --batch_size {smaller}"
        + (f", or free the {format_bytes(size)} of features kept there with --features_on_device off" if size else "")
    )


@torch.inference_mode()
def validation_loss(
    decoder: LSTMDecoder,
    features: Features,
    batches: BatchMaker,
    images: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> float:
    """Plain cross-entropy per token of these images' captions, whatever the training loss adds."""
    decoder.eval()
    total, tokens = 0.0, 0.0
    for captions in distributed.share(batches.plan(images, max(batch_size, 64))):
        batch = batches.make(captions)
        output = decoder(features.gather(batch.images, device), batch.to(device))
        total += float(decoder.cross_entropy(output.code, batch.targets.to(device)))
        tokens += len(batch.targets)
    total, tokens = distributed.total(total, tokens)
    return total / tokens
