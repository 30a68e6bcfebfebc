"""Faster forms of the parts of a training step that PyTorch's own operators do slowly.

`PackedLSTMLayer` is `torch.nn.LSTM` over a packed sequence, `ProjectedCrossEntropy` is
`F.cross_entropy(F.linear(...))`, `Dropout` is `torch.nn.Dropout`. The tests compare each with the plain one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# oneDNN, which multiplies bf16 on a CPU, compiles a kernel for each shape of a product, in 5 to 30 ms, and keeps it, in
# 3 MB. Hence numbers of rows are rounded up, so that few shapes come.
STEP_ROWS = 16  # of a step of the LSTM; a multiple of a tile of AMX
TOKEN_ROWS = 64  # of all tokens
ROWS_AT_A_TIME = 1024  # of the logits, so that they still lie in the processor's cache when they are read again


def matmul_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the type that matrix products of this tensor run in: autocast's where it is on, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def pad_rows(values: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return (N, D) with rows of zeros up to a multiple of so many."""
    missing = round_up(len(values), multiple) - len(values)
    return F.pad(values, (0, 0, 0, missing)) if missing else values


class PackedLSTMLayer(torch.autograd.Function):
    """One LSTM layer over a packed sequence, for the CPU.

    PyTorch's own packed CPU path slices its input at every step, and the gradient of each slice fills a
    tensor of the whole input's size with zeros: half of a training step. Here a step of the forward loop is
    one matrix product and four element-wise passes, the backward loop reuses its buffers, and the gradient
    of the recurrent weights is a single product over all tokens. Same equations as `torch.nn.LSTM`; under
    autocast the matrix products run in its type, all else in float32.
    """

    # In plain PyTorch, of a layer with gates = F.linear(packed, weight_ih_l0, bias_ih_l0 + bias_hh_l0):
    #     packed, _ = nn.LSTM(...)(PackedSequence(packed, sizes), (hidden, cell))
    # that is, for each step of n rows:
    #     i, f, g, o = (gates[step] + hidden[:n] @ weight.t()).chunk(4, 1)
    #     cell = f.sigmoid() * cell[:n] + i.sigmoid() * g.tanh()
    #     hidden = o.sigmoid() * cell.tanh()

    @staticmethod
    def forward(ctx, gates, weight, hidden, cell, sizes):  # type: ignore[no-untyped-def]
        """Args: gates: (N or more, 4H) input part, overwritten; weight: (4H, H); hidden, cell: (R, H); sizes: [rows per step].

        Rows of the output after the first N are zeros.
        """
        size = weight.shape[1]
        weight = weight.to(matmul_dtype(weight))
        outputs, cells = gates.new_empty(len(gates), size), gates.new_empty(len(gates), size)
        spare = weight.new_empty(len(gates) + STEP_ROWS, size)
        previous = spare[: len(gates)]  # the hidden state that each token started from
        h, c, start, tokens = hidden, cell, 0, sum(sizes)
        outputs[tokens:] = previous[tokens:] = 0
        for n in sizes:
            step = slice(start, start + n)
            previous[step] = h[:n]
            gate = gates[step]
            if weight.dtype == gates.dtype:
                gate.addmm_(previous[step], weight.t())
            else:
                gate.add_((spare[start : start + round_up(n, STEP_ROWS)] @ weight.t())[:n])
            gate[:, : 2 * size].sigmoid_()  # input, forget
            gate[:, 2 * size : 3 * size].tanh_()  # candidate
            gate[:, 3 * size :].sigmoid_()  # output
            i, f, g, o = gate.chunk(4, 1)
            c = torch.mul(f, c[:n], out=cells[step]).addcmul_(i, g)
            h = torch.mul(o, c.tanh(), out=outputs[step])
            start += n
        ctx.mark_dirty(gates)
        ctx.save_for_backward(gates, weight, cell, cells, previous)
        ctx.sizes = sizes
        return gates, outputs

    @staticmethod
    def backward(ctx, _, d_outputs):  # type: ignore[no-untyped-def]
        gates, weight, cell, cells, previous = ctx.saved_tensors
        size, end, later = weight.shape[1], sum(ctx.sizes), 0
        spare = gates.new_empty(len(gates) + STEP_ROWS, 4 * size)
        spare[end:] = 0
        d_gates = spare[: len(gates)]
        d_h = d_c = gates.new_zeros(0, size)
        for t in range(len(ctx.sizes) - 1, -1, -1):
            n = ctx.sizes[t]
            step = slice(end - n, end)
            c_before = cells[end - n - ctx.sizes[t - 1] :][:n] if t else cell
            i, f, g, o = gates[step].chunk(4, 1)
            d_i, d_f, d_g, d_o = d_gates[step].chunk(4, 1)
            tanh_c = cells[step].tanh()
            total = d_outputs[step].clone()
            total[:later] += d_h
            torch.mul(total, tanh_c, out=d_o).mul_(o).mul_(1 - o)
            d_cell = total.mul_(o).mul_(tanh_c.square_().neg_().add_(1))
            d_cell[:later] += d_c
            torch.mul(d_cell, g, out=d_i).mul_(i).mul_(1 - i)
            torch.mul(d_cell, c_before, out=d_f).mul_(f).mul_(1 - f)
            torch.mul(d_cell, i, out=d_g).mul_(1 - g.square())
            d_c = d_cell.mul_(f)
            rows = round_up(n, STEP_ROWS) if weight.dtype != gates.dtype else n
            d_h = (spare[end - n : end - n + rows].to(weight.dtype) @ weight)[:n].to(gates.dtype)
            end, later = end - n, n
        d_weight = (d_gates.to(weight.dtype).t() @ previous).to(gates.dtype)
        return d_gates, d_weight, d_h, d_c, None


class ProjectedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a vocabulary projection, without the (N, V) logits ever standing in memory.

    The gradient of a softmax is known as soon as the softmax is, so it is taken in the forward pass, a few
    rows at a time, while they are in the cache: one exponential per logit instead of three passes over
    all of them.
    """

    # In plain PyTorch:
    #     logits = F.linear(hidden_out, weight, bias)
    #     loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    #     return loss.sum() if token_weights is None else (loss * token_weights).sum()

    @staticmethod
    def forward(ctx, hidden_out, weight, bias, targets, token_weights, label_smoothing):  # type: ignore[no-untyped-def]
        """Return the sum over tokens of weight * loss, float32.

        Args:
            hidden_out: (N, E).
            weight: (V, E); bias: (V,), float32 under autocast too.
            targets: int64 (N,).
            token_weights: (N,) factors of the tokens' losses, or None for ones.
            label_smoothing: as in `F.cross_entropy`.
        """
        dtype, words = matmul_dtype(hidden_out), len(weight)
        multiple = TOKEN_ROWS if dtype != bias.dtype else 1
        low_weight, low_hidden = weight.detach().to(dtype), pad_rows(hidden_out.detach().to(dtype), multiple)
        needs_gradient = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=bias.dtype, device=hidden_out.device)
        if needs_gradient:
            d_hidden = torch.empty_like(hidden_out, dtype=bias.dtype)
            d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for start in range(0, len(hidden_out), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            target = targets[rows].unsqueeze(1)  # (n, 1)
            hidden = low_hidden[rows]  # (n, E), in the last round with the rows of zeros
            logits = (hidden @ low_weight.t())[: len(target)].to(bias.dtype).add_(bias)  # (n, V)
            logits -= logits.max(1, keepdim=True).values
            right = logits.gather(1, target).squeeze(1)
            mean = logits.mean(1) if label_smoothing else right
            normalizer = logits.exp_().sum(1)
            loss = normalizer.log() - (1 - label_smoothing) * right - label_smoothing * mean
            total += loss.sum() if token_weights is None else (loss * token_weights[rows]).sum()
            if needs_gradient:
                gradient = logits.div_(normalizer.unsqueeze(1))
                gradient -= label_smoothing / words
                gradient.scatter_add_(1, target, gradient.new_full(target.shape, label_smoothing - 1))
                if token_weights is not None:
                    gradient *= token_weights[rows].unsqueeze(1)
                d_bias += gradient.sum(0)
                low_gradient = pad_rows(gradient.to(dtype), multiple)
                d_hidden[rows] = (low_gradient @ low_weight)[: len(target)]
                d_weight += low_gradient.t() @ hidden
        if needs_gradient:
            ctx.save_for_backward(d_hidden, d_weight, d_bias)
            ctx.hidden_dtype = hidden_out.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):  # type: ignore[no-untyped-def]
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (d_hidden * scale).to(ctx.hidden_dtype), d_weight * scale, d_bias * scale, None, None, None


class Dropout(nn.Module):
    """In training, set a random part of the values to zero and scale the others up, so that the mean stays.

    PyTorch draws its masks on the CPU one number after another, which is a fifteenth of a training step;
    NumPy's SFC64 gives four 16-bit draws at once. It is seeded from PyTorch's generator, so that
    `torch.manual_seed` governs it too. The probability is rounded to a 65,536th.
    """

    # In plain PyTorch: F.dropout(values, probability, training=self.training)

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.probability:
            return values
        if values.device.type != "cpu":
            return F.dropout(values, self.probability)
        threshold = round(self.probability * 65536)
        seed = int(torch.randint(2**62, ()))
        draws = np.random.SFC64(seed).random_raw(-(-values.numel() // 4)).view(np.uint16)[: values.numel()]
        kept = torch.from_numpy(draws >= threshold).view(values.shape)
        return values * kept * (65536 / (65536 - threshold))
