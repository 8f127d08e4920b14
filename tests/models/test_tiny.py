import torch

from lightning_peft.models.attention import supports_packing
from lightning_peft.models.loading import empty_model, load_model, load_tokenizer, model_context
from lightning_peft.models.source import ModelConfig


def test_equal_seeds_give_equal_weights_and_leave_the_global_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_model(ModelConfig("tiny"), torch.float32)
    assert torch.equal(torch.rand(3), expected)
    second = load_model(ModelConfig("tiny"), torch.float32)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_head_is_tied_only_in_tiny_tied() -> None:
    for name, tied in [("tiny", False), ("tiny_tied", True)]:
        model = load_model(ModelConfig(name), torch.bfloat16)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert model.dtype == torch.bfloat16 and supports_packing(model)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tokenizer_round_trip_and_special_tokens() -> None:
    tokenizer = load_tokenizer(ModelConfig("tiny"))
    text = "héllo\n  wörld 東京 <|im_end|>\tx"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == 259


def test_chat_template_writes_turns() -> None:
    tokenizer = load_tokenizer(ModelConfig("tiny"))
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_empty_model_has_names_and_shapes_but_no_weights() -> None:
    empty, full = empty_model(ModelConfig("tiny")), load_model(ModelConfig("tiny"), torch.float32)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())
    assert model_context(ModelConfig("tiny")) == 2048


def test_new_tokens_start_at_the_mean() -> None:
    before = load_model(ModelConfig("tiny"), torch.float32)
    names = [f"<t{i}>" for i in range(70)]
    config = ModelConfig("tiny", new_tokens=names)
    model, tokenizer = load_model(config, torch.float32), load_tokenizer(config)
    assert tokenizer.convert_tokens_to_ids(names) == list(range(259, 329)) and model.config.vocab_size == 329
    assert empty_model(config).get_input_embeddings().weight.shape == (329, 64)
    for new, old in [
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ]:
        assert torch.equal(new.weight[:259], old.weight[:259])
        torch.testing.assert_close(new.weight[259:], old.weight[:259].mean(0).expand(70, -1))
