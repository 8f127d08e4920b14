"""Whole models as GGUF files: read back with equal logits, and with all that llama.cpp runs them by."""

import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import torch
from families import small_model
from pieces import TEXTS, pieces_tokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.gguf import GGUFFile
from lightning_peft.models.gguf_families import GGUFModelError, check_family
from lightning_peft.models.gguf_vocabulary import GPT_4O, LLAMA_3
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig, locate
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.serving.gguf_model import write_gguf_model
from lightning_peft.serving.gguf_tokenizer import name_for, scores_of, split_name

IDS = torch.arange(3, 35)[None]
WHOLE = {"type": "ByteLevel", "use_regex": False}
LAYOUT = PromptLayout(system_prompt='Say "yes".', stop_token_ids=[2])


def written(model, folder: Path, dtype: str, base_file: Path | None = None) -> Path:
    path = folder / "model.gguf"
    write_gguf_model(model, tiny_tokenizer(), LAYOUT, path, dtype, base_file, "small")
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_file_read_back_has_the_logits_of_its_weights(family: str, dtype: str, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    extra = {"rope_parameters": rope} if family == "llama" else {}
    model = small_model(family, use_sliding_window=False, sliding_window=None, vocab_size=320, **extra)
    path = written(model, tmp_path, dtype)

    read = load_model(ModelConfig("hf", str(path), attention="sdpa"), torch.float32)

    kind = gguf.GGMLQuantizationType[{"fp32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}[dtype]]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                packed = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    # llama3's frequencies are stored as fp32 ratios.
    torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2}
    assert kinds == {kind}


def test_tokenizer_template_and_stops_are_in_the_file(tmp_path: Path) -> None:
    path = written(tiny_model(), tmp_path, "bf16")
    fields = GGUFFile(path).fields
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.merges"] == ["none"]  # it has no rules, and llama.cpp refuses a file without any
    assert len(tokens) == 320 and tokens[1] == "<|im_start|>" and fields["tokenizer.ggml.token_type"][258:260] == [1, 5]
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and fields["tokenizer.ggml.add_bos_token"] is False
    tokenizer = load_tokenizer(ModelConfig("hf", str(path)))
    text = "Grüße, 12 apples\n"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == '<|im_start|>system\nSay "yes".<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n'


@pytest.mark.slow
def test_metadata_of_a_base_file_are_kept(tmp_path: Path) -> None:
    """SmolLM2's own file is the base: everything it says stays, but for what is of the new one."""
    base = locate(ModelConfig("smollm2_135m"))
    model = load_model(ModelConfig("smollm2_135m"), torch.bfloat16)
    path = tmp_path / "model.gguf"
    tokenizer = load_tokenizer(ModelConfig("smollm2_135m"))
    write_gguf_model(model, tokenizer, PromptLayout(), path, "bf16", base, "small")

    old, new = GGUFFile(base), GGUFFile(path)
    changed = {key for key in old.fields | new.fields if old.fields.get(key) != new.fields.get(key)}
    assert changed == {"general.file_type"}
    assert old.tensors.keys() == new.tensors.keys()
    read = load_model(ModelConfig("hf", str(path)), torch.bfloat16)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in read.state_dict().items())


@pytest.mark.parametrize("from_file", [False, True])
def test_every_place_of_a_stop_token_is_used(from_file: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer's own end is 2; the run's others come after it, where a base's file brings the metadata too."""
    base = written(tiny_model(), tmp_path, "bf16") if from_file else None
    path = tmp_path / "stops.gguf"
    layout = PromptLayout(stop_token_ids=[2, 5, 7, 9])
    write_gguf_model(tiny_model(), tiny_tokenizer(), layout, path, "bf16", base, "small")
    fields = GGUFFile(path).fields
    assert [fields[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")] == [2, 5, 7]
    assert "answers end at the tokens [9] too" in caplog.text


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(GGUFModelError, match="the metadata of rwkv is not known here, only that of llama, mistral"):
        check_family("rwkv")
    model = small_model("llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=3, vocab_size=320)
    with pytest.raises(GGUFModelError, match="dtype=q8_0: token_embd.weight has rows of 48, not a multiple of 32"):
        written(model, tmp_path, "q8_0")


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([{"type": "ByteLevel", "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA_3}}, WHOLE], "dbrx"),
        ([{"type": "Split", "pattern": {"Regex": GPT_4O}}, WHOLE], "gpt-4o"),
        ([{"type": "Whitespace"}, {"type": "ByteLevel"}], None),
        ([{"type": "Split", "pattern": {"Regex": LLAMA_3}}, {"type": "ByteLevel", "use_regex": True}], None),
        ([{"type": "Digits", "individual_digits": True}, WHOLE], None),
        ([{"type": "ByteLevel", "use_regex": True, "add_prefix_space": True}], None),
    ],
)
def test_split_of_a_tokenizer_is_told(parts: list[dict[str, object]], name: str | None) -> None:
    splitter = {"type": "Sequence", "pretokenizers": parts}
    content = {"model": {"type": "BPE", "merges": [["a", "b"]]}, "pre_tokenizer": splitter}
    if name is not None:
        assert split_name(content) == name
    else:
        with pytest.raises(GGUFModelError, match="this tokenizer is none of those written here"):
            split_name(content)


@pytest.mark.parametrize(("normalizer", "is_known"), [("NFC", True), ("Lowercase", False)])
def test_what_a_tokenizer_does_to_a_text_before_is_said(
    normalizer: str, is_known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, splitter = {"type": "BPE", "merges": [["a", "b"]]}, {"type": "ByteLevel", "use_regex": True}
    content = {"model": model, "pre_tokenizer": splitter, "normalizer": {"type": normalizer}}
    with nullcontext() if is_known else pytest.raises(GGUFModelError, match="is none of those"):
        assert split_name(content) == "gpt-2"
        assert "composes letters (NFC) and llama.cpp does not" in caplog.text


@pytest.mark.parametrize(
    ("regex", "rules", "name"),
    [(LLAMA_3, [["a", "b"]], "llama-bpe"), (GPT_4O, [["a", "b"], ["ab", "c"]], "gpt-4o"), (GPT_4O, [["a", "b"]], None)],
)
def test_a_word_that_is_a_token_stays_one_or_comes_of_the_rules(regex: str, rules: list[list[str]], name: str) -> None:
    vocabulary = {piece: number for number, piece in enumerate(["a", "b", "c", "ab", "abc"])}
    content = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": rules, "ignore_merges": True},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}}, WHOLE],
        },
    }
    with pytest.raises(GGUFModelError, match="is none of those") if name is None else nullcontext():
        assert split_name(content) == name


def test_tokens_that_take_blanks_are_named_or_said(caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp knows Phi-3's by the model's name alone."""
    tokenizer = tiny_tokenizer()
    assert name_for(tokenizer, "run") == "run" and not caplog.text
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True)])
    assert name_for(tokenizer, "run") == "run"
    assert "1 tokens take the blanks around them, such as <|end|>: llama.cpp leaves those in the text" in caplog.text
    phi = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab={"a": 0}, merges=[])))
    phi.add_tokens([AddedToken("<s>"), AddedToken("<|user|>", rstrip=True), AddedToken("</s>", rstrip=True)])
    assert name_for(phi, "run") == "run"  # of a file without these two llama.cpp would load nothing
    phi.add_tokens([AddedToken("<unk>"), AddedToken("<|endoftext|>")])
    assert name_for(phi, "run") == "phi-3 run"


@pytest.mark.parametrize(("run", "name"), [("phi3-sql", "phi 3-sql"), ("my_Phi-3.5", "my_Phi 3.5"), ("phi-4", "phi-4")])
def test_a_run_that_is_called_phi_3_is_not_taken_for_one(run: str, name: str) -> None:
    """llama.cpp would take the blanks behind special tokens, or not load the file."""
    assert name_for(tiny_tokenizer(), run) == name


def merged_by_scores(text: str, tokens: list[str], scores: list[float], kinds: list[int]) -> list[int]:
    """Return SentencePiece's tokens: the pair whose piece has the highest score first, the leftmost of equals."""
    numbers = {token: number for number, token in enumerate(tokens) if kinds[number] == 1}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        found = [(scores[numbers[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in numbers]
        if not found:
            break
        at = -max(found)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    ids = [[numbers[p]] if p in numbers else [tokens.index(f"<0x{byte:02X}>") for byte in p.encode()] for p in parts]
    return [number for part in ids for number in part]


def test_a_tokenizer_of_pieces_is_written_with_their_scores(tmp_path: Path) -> None:
    """Its tokens by SentencePiece's own rule are those of the tokenizer, bytes for what it has no letter for, too."""
    tokenizer = pieces_tokenizer()
    model = small_model("llama", vocab_size=len(tokenizer) + 3)
    path = tmp_path / "model.gguf"
    write_gguf_model(model, tokenizer, PromptLayout(stop_token_ids=[2]), path, "fp32", None, "small")
    fields = GGUFFile(path).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert kinds[:4] == [2, 3, 3, 6] and kinds[-3:] == [5, 5, 5] and len(tokens) == len(tokenizer) + 3
    for text in (*TEXTS, "  List   all\n\tGrüße 漢字 🚀", "", "the the lazylazy"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert merged_by_scores(text, tokens, scores, kinds) == (expected or [tokens.index("▁")])


def test_scores_follow_the_rules_where_pieces_stand_in_another_order(tmp_path: Path) -> None:
    tokenizer = pieces_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    turned = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    model, path = small_model("llama", vocab_size=len(tokenizer)), tmp_path / "m.gguf"
    write_gguf_model(model, turned, PromptLayout(), path, "fp32", None, "m")
    fields = GGUFFile(path).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert any(turned(text)["input_ids"] != tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS)
    for text in TEXTS:
        assert merged_by_scores(text, tokens, scores, kinds) == turned(text)["input_ids"]


def test_a_piece_whose_rules_stand_apart_is_refused() -> None:
    vocabulary = {piece: number for number, piece in enumerate(["a", "b", "c", "ab", "abc", "bc"])}
    merges = [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]
    content = {
        "model": {"vocab": vocabulary, "merges": merges}, "pre_tokenizer": None,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    }  # fmt: skip
    with pytest.raises(GGUFModelError, match="is not SentencePiece's BPE as in Llama 2"):
        scores_of(content, [1] * 6)
    content["model"]["merges"] = merges[:3]
    assert scores_of(content, [1] * 6) == [-3.0, -4.0, -5.0, 0.0, -1.0, -2.0]


def test_added_tokens_do_not_fit_a_base_file(tmp_path: Path) -> None:
    path = written(tiny_model(), tmp_path, "bf16")
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(70)])
    with pytest.raises(GGUFModelError, match="the run added 9 tokens to those of model.gguf"):
        write_gguf_model(tiny_model(), tokenizer, LAYOUT, tmp_path / "b.gguf", "bf16", path, "small")


@pytest.mark.parametrize("window", [8, None])
def test_a_window_that_llama_cpp_does_not_have_is_said(
    window: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model("mistral", sliding_window=window, vocab_size=320)
    written(model, tmp_path, "fp32")
    said = "this model attends to the last 8 tokens, llama.cpp to all" in caplog.text
    assert said is (window is not None)
