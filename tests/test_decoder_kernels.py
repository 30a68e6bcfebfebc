"""What runs fast gives what the plain operators give: losses, gradients, and dropout's statistics."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from captioning.decoders.kernels import ROWS_AT_A_TIME, Dropout, ProjectedCrossEntropy
from captioning.decoders.lstm import LSTMDecoder


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("weighted", (False, True))
def test_projected_cross_entropy_is_cross_entropy_of_the_projection(smoothing, weighted):
    torch.manual_seed(0)
    tokens, size, words = ROWS_AT_A_TIME + 37, 12, 50  # more than one piece
    hidden_out, weight, bias = (
        torch.randn(shape, dtype=torch.double, requires_grad=True)
        for shape in ((tokens, size), (words, size), (words,))
    )
    targets = torch.randint(words, (tokens,))
    factors = torch.randn(tokens, dtype=torch.double) if weighted else None
    ours = ProjectedCrossEntropy.apply(hidden_out, weight, bias, targets, factors, smoothing)
    each = F.cross_entropy(F.linear(hidden_out, weight, bias), targets, label_smoothing=smoothing, reduction="none")
    theirs = (each * factors).sum() if weighted else each.sum()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (hidden_out, weight, bias)),
        torch.autograd.grad(3 * theirs, (hidden_out, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(
            ProjectedCrossEntropy.apply(hidden_out, weight, bias, targets, factors, smoothing), theirs
        )


def test_dropout_keeps_the_mean_drops_its_share_and_follows_the_seed():
    torch.manual_seed(3)
    values = torch.ones(1000, 301, requires_grad=True)
    module = Dropout(0.3)
    assert module.eval()(values) is values and Dropout(0.0)(values) is values
    out = module.train()(values)
    assert abs(float((out == 0).double().mean()) - 0.3) < 0.005 and abs(float(out.detach().mean()) - 1) < 0.01
    assert set(out.unique().tolist()) == {0.0, float(out.detach().max())}
    (gradient,) = torch.autograd.grad(out.sum(), values)
    assert torch.equal(gradient, out)
    torch.manual_seed(3)
    assert torch.equal(module(values), out) and not torch.equal(module(values), out)
    rows = out.detach() == 0
    assert abs(float((rows[1:] & rows[:-1]).double().mean()) - 0.09) < 0.005  # neighbours fall independently


class ProductShapes(TorchDispatchMode):
    """Collects the shapes of matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.add(tuple(value.shape for value in args[-2:]))
        return function(*args, **(kwargs or {}))


def test_under_autocast_batches_share_their_shapes_and_the_lstm_is_that_of_float32_within_its_rounding():
    """oneDNN keeps a kernel in memory for every shape of a bf16 product, so there should be few shapes."""
    torch.manual_seed(0)
    decoder = LSTMDecoder(30, 8, 32, 32, 2, 0.0)

    def run(sizes):
        tokens = sum(sizes)
        inputs = [
            torch.randn(shape, requires_grad=True) for shape in ((tokens, 32), (2, sizes[0], 32), (2, sizes[0], 32))
        ]
        targets = torch.randint(30, (tokens,))

        def results():
            out = decoder.run_lstm(inputs[0], torch.tensor(sizes), *inputs[1:])
            loss = decoder.cross_entropy(out, targets)
            return [out, *torch.autograd.grad(loss, [*inputs, *decoder.lstm.parameters(), decoder.embed.weight])]

        with torch.autocast("cpu", torch.bfloat16), ProductShapes() as seen:
            low = results()
        for a, b in zip(low, results(), strict=True):
            assert a.shape == b.shape and a.dtype == torch.float32
            assert (a - b).detach().norm() < 0.02 * b.detach().norm()
        return seen.shapes

    assert run([7, 7, 5, 2, 1]) == run([9, 6, 6, 3, 2, 1])
