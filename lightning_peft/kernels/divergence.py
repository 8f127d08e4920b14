"""Divergence of two output heads' distributions beside the cross entropy of one, a chunk of tokens at a time.

A chunk makes the logits of both heads, both losses and the gradient of their weighted sum, so that memory is two chunks
of logits however many tokens there are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.kernels.cross_entropy import LogitTransform, softmax_rows, write_logits_


class Mix(NamedTuple):
    """loss = (1 - weight) * cross entropy + weight * temperature^2 * divergence, p and q taken at the temperature.

    p is the student's distribution, q the teacher's. beta 0 is KL(q || p), 1 is KL(p || q), between them
    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p   (Agarwal et al. 2024, arXiv:2306.13649).
    """

    weight: float = 0.5
    temperature: float = 1.0
    beta: float = 0.0


def in_fp32(logits: Tensor) -> Tensor:
    """Return 16-bit logits in fp32, others as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the divergence of each row, (N,), of log-probabilities (N, V); autograd goes through both."""
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    return beta * of_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)


def divergence_with_gradient(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row, (N,), and its gradient for the logits behind `student`, (N, V).

    The gradient of KL(q || p) is p - q, that of the others p (r - p . r) with r = log p - log q, or (1 - beta) (log p -
    log m).
    """
    probabilities = student.exp()
    if beta == 0:
        target = teacher.exp()
        return (target * (teacher - student)).sum(-1), probabilities.sub_(target)
    other = teacher
    if beta != 1:
        other = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    ratios = student - other
    found = (probabilities * ratios).sum(-1)
    gradient = probabilities.mul_(ratios.sub_(found[:, None]))
    if beta == 1:
        return found, gradient
    return (1 - beta) * found + beta * (teacher.exp() * (teacher - other)).sum(-1), gradient.mul_(1 - beta)


def log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return both logits' log-probabilities at the temperature, over the tokens that both heads have.

    Heads of one vocabulary may be padded to different sizes; what lies beyond the smaller one is no token.
    """
    shared = min(student.shape[1], teacher.shape[1])
    both = (in_fp32(logits[:, :shared]) / temperature for logits in (student, teacher))
    own, other = (F.log_softmax(logits, -1) for logits in both)
    return own, other


def taught_losses(student: Tensor, teacher: Tensor, labels: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Return cross entropy and divergence of each row, (N,) each, of final logits (N, V); autograd goes through."""
    cross_entropy = F.cross_entropy(in_fp32(student), labels, reduction="none")
    return cross_entropy, divergence(*log_probabilities(student, teacher, mix.temperature), mix.beta)


def taught_losses_with_gradient_(
    logits: Tensor, teacher: Tensor, labels: Tensor, transform: LogitTransform | None, mix: Mix
) -> tuple[Tensor, Tensor]:
    """Return what `taught_losses` does, and overwrite the student's logits with the gradient of their `mix`.

    logits (N, V) are those of the head itself, before `transform`; the teacher's are final.
    """
    transformed = logits
    if transform is not None:
        leaf = in_fp32(logits).clone().requires_grad_()
        with torch.enable_grad():
            transformed = transform(leaf)
    values = in_fp32(transformed.detach())
    own = F.log_softmax(values, -1)
    cross_entropy = -own.gather(1, labels[:, None]).squeeze(1)
    student, target = log_probabilities(values, teacher, mix.temperature)
    diverged, towards_teacher = divergence_with_gradient(student, target, mix.beta)
    gradient = own.exp_()
    gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0)).mul_(1 - mix.weight)
    # d(T^2 D(z / T)) / dz = T D'
    gradient[:, : student.shape[1]].add_(towards_teacher, alpha=mix.weight * mix.temperature)
    if transform is not None:
        (gradient,) = torch.autograd.grad(transformed, leaf, gradient)
    logits.copy_(gradient)
    return cross_entropy, diverged


class FrozenHeadTaughtLosses(torch.autograd.Function):
    """Mixed loss, cross entropy and divergence, (N,) each, of rows of hidden (N, D) under a frozen head weight (V, D).

    `teacher` gives the teacher's final logits of a slice of the rows. The first result has a gradient, for hidden only,
    kept from the forward pass; the other two are for the log.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: Callable[[slice], Tensor],
        chunk: int,
        transform: LogitTransform | None,
        mix: Mix,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        cross_entropy, diverged = (hidden.new_empty(hidden.shape[0], dtype=kept) for _ in range(2))
        hidden = hidden.to(weight.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        buffer = weight.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
        rows = softmax_rows(weight.shape[0]) if hidden.device.type == "cpu" else chunk
        for start in range(0, hidden.shape[0], chunk):
            tokens = slice(start, min(start + chunk, hidden.shape[0]))
            logits = buffer[: tokens.stop - start]
            write_logits_(logits, hidden[tokens], weight, bias)
            taught = teacher(tokens)
            for place in range(start, tokens.stop, rows):
                part = slice(place, min(place + rows, tokens.stop))
                inside = slice(place - start, part.stop - start)
                if grad_hidden is None:
                    values = logits[inside] if transform is None else transform(in_fp32(logits[inside]))
                    found = taught_losses(values, taught[inside], labels[part], mix)
                else:
                    found = taught_losses_with_gradient_(logits[inside], taught[inside], labels[part], transform, mix)
                cross_entropy[part], diverged[part] = found
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[tokens])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(cross_entropy, diverged)
        return mixed(cross_entropy, diverged, mix), cross_entropy, diverged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grads[0][:, None].to(grad_hidden.dtype), None, None, None, None, None, None, None


def mixed(cross_entropy: Tensor, diverged: Tensor, mix: Mix) -> Tensor:
    """Return (1 - weight) * cross entropy + weight * temperature^2 * divergence."""
    return (1 - mix.weight) * cross_entropy + mix.weight * mix.temperature**2 * diverged
