from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate

NO = -100
A = Encoded([11, 12, 13], [NO, 12, 13], True)
B = Encoded([21, 22], [21, 22], True)
C = Encoded([31, 32, 33, 34], [NO, NO, 33, 34], True)


def test_packed_batch_by_hand():
    batch = collate([[A, B], [C]], pad_token_id=9, max_length=8, packing=True)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 9, 9, 9], [31, 32, 33, 34, 9, 9, 9, 9]]
    assert batch.labels.tolist() == [[NO, 12, 13, NO, 22, NO, NO, NO], [NO, NO, 33, 34, NO, NO, NO, NO]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 16]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_supervised) == (8, 9, 5)
    assert [str(t.dtype) for t in (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens)] == [
        "torch.int64"
    ] * 3 + ["torch.int32"]


def test_unpacked_rows_are_padded_to_a_multiple_of_eight():
    long = Encoded(list(range(9)), list(range(9)), True)
    assert collate([[long], [A]], 0, max_length=64, packing=False).input_ids.shape == (2, 16)
    assert collate([[C], [A]], 0, max_length=64, packing=False).input_ids.shape == (2, 8)
    assert collate([[long], [A]], 0, max_length=10, packing=False).input_ids.shape == (2, 10)


def test_first_label_of_a_sample_is_never_trained():
    whole = Encoded([5, 6], [5, 6], True)
    assert collate([[whole, whole]], 0, max_length=4, packing=True).labels.tolist() == [[NO, 6, NO, 6]]


def test_filler_has_no_labels_and_counts_nothing():
    batch = collate([[A, B]], 9, 8, packing=True, filler=True)
    assert (batch.labels == NO).all()
    assert (batch.num_tokens, batch.num_supervised) == (0, 0)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 9, 9, 9]]


def test_weights_stand_beside_the_labels_and_are_summed_over_them():
    weighted = Encoded([41, 42, 43], [NO, 42, 43], True, weights=[1.0, 0.5, 0.25])
    batch = collate([[weighted, A]], pad_token_id=9, max_length=8, packing=True)
    assert batch.weights.tolist() == [[1.0, 0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0]]
    assert (batch.num_supervised, batch.weight_sum, batch.loss_weight) == (4, 2.75, 2.75)


def test_plain_batches_have_no_weights():
    batch = collate([[A, B]], pad_token_id=9, max_length=8, packing=True)
    assert batch.weights is None and batch.loss_weight == batch.num_supervised
