"""A teacher on the meta device: the tensors that it stores beside the base, and those that it leaves for the loss."""

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.adapters.inject import adapters, trained_in_full
from lightning_peft.data.batch import Batch
from lightning_peft.estimation.model_states import adapter_parts, array_of, tensors_of
from lightning_peft.estimation.recorder import Array
from lightning_peft.objectives.linear_cross_entropy import Readout
from lightning_peft.objectives.teacher import TaughtLoss, Teacher


class EmptyTeacher(Teacher):
    """A head and hidden states of the teacher's sizes.

    The passing needs of the teacher's blocks are left out: they are over before the student's activations are made.
    """

    def __init__(self, teacher: PreTrainedModel):
        super().__init__(teacher)
        head = teacher.get_output_embeddings()
        width = getattr(head, "in_features", teacher.config.get_text_config().hidden_size)
        self.vocabulary: int = teacher.config.get_text_config().vocab_size
        self.head = nn.Linear(width, self.vocabulary, bias=False, device="meta", dtype=teacher.dtype)
        self.head.requires_grad_(False)

    def check(self, batch: Batch) -> None:
        """See nothing: there are no values."""

    def readout(self, batch: Batch) -> Readout:
        weight = self.head.weight
        hidden = torch.empty(batch.num_supervised, weight.shape[1], dtype=weight.dtype, device=weight.device)
        labels = torch.empty(batch.num_supervised, dtype=torch.int64, device=weight.device)
        return Readout(hidden, self.head, None, labels, labels, None, self.vocabulary)


def give_empty_teacher(objective: TaughtLoss, teacher: PreTrainedModel) -> None:
    """Give the loss a teacher without values, whose head is the loss's own, so that it is no memory of a step."""
    objective.teacher = empty = EmptyTeacher(teacher)
    objective.add_module("head_of_teacher", empty.head)


def stored_by_teacher(teacher: PreTrainedModel, student: PreTrainedModel, shares_base: bool) -> Counter[Array]:
    """Return all tensors of a teacher; on a shared base those of its adapter, and its copies of what trains."""
    if not shares_base:
        return _distinct(tensors_of(teacher))
    own = dict(student.named_parameters())
    adapted = [tensor for part in adapter_parts(teacher) for tensor in tensors_of(part)]
    base = {id(tensor) for _, layer in adapters(teacher) for tensor in tensors_of(layer.base_layer)}
    kept = [tensor for tensor in adapted if id(tensor) not in base]
    return _distinct([*kept, *(own[name] for name in trained_in_full(student))])


def _distinct(tensors: list[Tensor]) -> Counter[Array]:
    return Counter(array_of(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
