"""The chunked divergence of two heads against the plain one: all logits, torch's kl_div, autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft.kernels.divergence import Mix
from lightning_peft.objectives import linear_divergence as module
from lightning_peft.objectives.linear_cross_entropy import Readout
from lightning_peft.objectives.linear_divergence import taught_token_losses

VOCABULARY = 50
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}
TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.bfloat16: {"rtol": 2**-5, "atol": 2**-7}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "chunk_tokens", lambda vocabulary, device: 8)
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 8)


def softcap(logits):
    return 2.0 * torch.tanh(logits / 2.0)


def readouts(dtype=torch.float64, tokens=37, transform=None, teacher_rows=VOCABULARY, bias=True):
    """Return a student of width 16 and a teacher of width 24."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCABULARY - 5, (tokens,), generator=generator)
    found = []
    for width, rows in ((16, VOCABULARY), (24, teacher_rows)):
        hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
        head = nn.Linear(width, rows, dtype=dtype, bias=bias)
        for parameter in head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 3
        found.append(Readout(hidden, head, transform, labels, torch.zeros_like(labels), None, rows))
    return found


def plain(student, teacher, mix):
    """Return the cross entropy and divergence of each token, by torch's functions of whole logits."""
    logits = [r.head(r.hidden).to(torch.float64) for r in (student, teacher)]
    logits = [logit if student.transform is None else student.transform(logit) for logit in logits]
    cross_entropy = F.cross_entropy(logits[0], student.labels, reduction="none")
    shared = min(student.vocabulary, teacher.vocabulary)
    p, q = ((logit[:, :shared] / mix.temperature).log_softmax(-1) for logit in logits)
    q = q.detach()

    def kl(one, other):
        return F.kl_div(other, one, reduction="none", log_target=True).sum(-1)

    if mix.beta in (0, 1):
        return cross_entropy, kl(q, p) if mix.beta == 0 else kl(p, q)
    m = torch.stack([p + math.log(1 - mix.beta), q + math.log(mix.beta)]).logsumexp(0)
    return cross_entropy, mix.beta * kl(q, m) + (1 - mix.beta) * kl(p, m)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head", ["frozen", "trained", "frozen without bias", "frozen softcap", "trained softcap"])
@pytest.mark.parametrize("kind", BETAS)
def test_values_and_gradients_equal_the_plain_formula(kind, head, dtype):
    mix = Mix(0.7, 2.0, BETAS[kind])
    transform = softcap if "softcap" in head else None
    student, teacher = readouts(dtype, transform=transform, bias="without" not in head)
    student.head.requires_grad_("trained" in head)
    asked = [student.hidden, *(p for p in student.head.parameters() if p.requires_grad)]
    scales = torch.linspace(0.5, 2.0, len(student.labels), dtype=torch.float64)
    losses = taught_token_losses(student, teacher, mix)
    cross_entropy, divergence = plain(student, teacher, mix)
    expected = 0.3 * cross_entropy + 0.7 * 4 * divergence
    for ours, theirs in zip(losses, (expected, cross_entropy, divergence), strict=True):
        assert ours.dtype == (dtype if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(ours.double(), theirs, **TOLERANCES[dtype])
    assert not losses.cross_entropy.requires_grad and not losses.divergence.requires_grad
    ours = torch.autograd.grad(losses.mixed @ scales.to(losses.mixed.dtype), asked)
    theirs = torch.autograd.grad(expected @ scales, asked)
    for got, wanted in zip(ours, theirs, strict=True):
        # A trained head's gradient is a sum over the tokens, so its rounding goes by the largest of them.
        room = TOLERANCES[dtype] | {"atol": TOLERANCES[dtype]["atol"] * max(1.0, float(wanted.abs().max()))}
        torch.testing.assert_close(got, wanted, **room)


@pytest.mark.parametrize("teacher_rows", [VOCABULARY - 4, VOCABULARY + 6])
def test_heads_padded_to_other_sizes_are_compared_over_the_tokens_of_both(teacher_rows):
    student, teacher = readouts(teacher_rows=teacher_rows)
    student.head.requires_grad_(False)
    mix = Mix(0.5, 1.0, 0.0)
    losses = taught_token_losses(student, teacher, mix)
    cross_entropy, divergence = plain(student, teacher, mix)
    torch.testing.assert_close(losses.divergence, divergence, **TOLERANCES[torch.float64])
    (ours,) = torch.autograd.grad(losses.mixed.sum(), student.hidden)
    (theirs,) = torch.autograd.grad((cross_entropy + divergence).sum() / 2, student.hidden)
    torch.testing.assert_close(ours, theirs, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("kind", BETAS)
def test_models_whose_logits_are_not_rebuilt_are_compared_by_their_own(kind):
    own = [r._replace(hidden=r.head(r.hidden).detach().requires_grad_(), head=nn.Identity()) for r in readouts()]
    mix = Mix(0.7, 2.0, BETAS[kind])
    cross_entropy, divergence = plain(*own, mix)
    expected = 0.3 * cross_entropy + 0.7 * 4 * divergence
    for teacher in (own[1], readouts()[1]):  # these are the teacher's, logits or hidden states
        losses = taught_token_losses(own[0], teacher, mix)
        torch.testing.assert_close(losses.mixed, expected, **TOLERANCES[torch.float64])
    (ours,) = torch.autograd.grad(losses.mixed.sum(), own[0].hidden)
    (theirs,) = torch.autograd.grad(expected.sum(), own[0].hidden)
    torch.testing.assert_close(ours, theirs, **TOLERANCES[torch.float64])


@pytest.mark.parametrize("kind", BETAS)
def test_equal_heads_diverge_by_nothing_and_have_no_gradient(kind):
    student, _ = readouts(torch.float32)
    student.head.requires_grad_(False)
    losses = taught_token_losses(student, student, Mix(1.0, 1.0, BETAS[kind]))
    (gradient,) = torch.autograd.grad(losses.mixed.sum(), student.hidden)
    assert losses.divergence.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def test_no_tokens_give_zero_loss_and_zero_gradient():
    student, teacher = readouts(torch.float32)
    student.head.requires_grad_(False)
    empty = [r._replace(hidden=r.hidden[:0], labels=r.labels[:0]) for r in (student, teacher)]
    losses = taught_token_losses(*empty, Mix())
    (gradient,) = torch.autograd.grad(losses.mixed.sum(), student.hidden)
    assert losses.divergence.sum() == 0 and not gradient.any()


def test_no_logits_of_all_tokens_exist(monkeypatch):
    """The largest tensor that a forward and backward pass makes has a chunk of tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.update(tuple(x.shape) for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    for trained in (False, True):
        student, teacher = readouts(torch.float32)
        student.head.requires_grad_(trained)
        with Shapes():
            taught_token_losses(student, teacher, Mix()).mixed.sum().backward()
    assert (8, VOCABULARY) in seen and (37, VOCABULARY) not in seen
