import pytest
from transformers import AutoTokenizer
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from hf_crouter.chunking import tokenizer_fingerprint
from hf_crouter.errors import InputError
from hf_crouter.hosts.convert import convert_gguf
from hf_crouter.hosts.fetch import cached_host
from hf_crouter.hosts.gguf_reader import read_gguf
from hf_crouter.hosts.gguf_tokenizers import gguf_tokenizer, merges_of

from .gguf_files import write_gguf


def made(family, folder, **options):
    write_gguf(folder / "m.gguf", family)
    convert_gguf(folder / "m.gguf", folder / family, title="Tiny", **options)
    return AutoTokenizer.from_pretrained(folder / family)


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


def test_llama_splits_digits_where_asked(tmp_path):
    split = made("llama", tmp_path, splits_digits=True)
    assert pieces(split, "  5") == ["ĠĠ", "5"]
    (tmp_path / "not").mkdir()
    assert pieces(made("llama", tmp_path / "not", splits_digits=False), "  5") == ["Ġ", "Ġ", "5"]
    assert split.decode(split("x =  10\n").input_ids) == "x =  10\n"
    assert (split.bos_token_id, split.eos_token_id, split.pad_token_id) == (1, 2, 2)
    assert split.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_qwen2_has_the_originals_rules(tmp_path):
    tokenizer = made("qwen2", tmp_path)
    assert pieces(tokenizer, "12") == ["1", "2"]  # digits one by one, whatever the merges
    assert pieces(tokenizer, "   th") == ["ĠĠ", "Ġ", "th"]  # the last space belongs to the word
    assert pieces(tokenizer, "e\u0301") == pieces(tokenizer, "é")  # composed first
    assert pieces(tokenizer, "<|im_start|>th<tool_call>") == ["<|im_start|>", "th", "<tool_call>"]
    ids = tokenizer("<|im_end|>a<|fim_prefix|><tool_call>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<|fim_prefix|><tool_call>"
    assert tokenizer.bos_token is None and tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == 264 and "[PAD270]" not in tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer("a 好 🙂\n").input_ids) == "a 好 🙂\n"
    vocab = {token: n for token, n in tokenizer.get_vocab().items() if n < 259}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[("Ġ", "Ġ"), ("t", "h"), ("1", "2")])
    ours, theirs = (t.backend_tokenizer for t in (tokenizer, theirs))
    assert str(ours.pre_tokenizer) == str(theirs.pre_tokenizer) and str(ours.normalizer) == str(theirs.normalizer)


def test_gemma_has_the_originals_rules(tmp_path):
    tokenizer = made("gemma3", tmp_path)
    assert pieces(tokenizer, " the") == ["<bos>", "▁the"]
    assert pieces(tokenizer, "   the") == ["<bos>", "▁▁▁", "t", "he"]  # runs of spaces first
    assert pieces(tokenizer, "a\n\nb<table>") == ["<bos>", "a", "\n\n", "b", "<table>"]
    assert pieces(tokenizer, "é") == ["<bos>", "<0xC3>", "<0xA9>"]
    ids = tokenizer("<start_of_turn>a é 好\n<unused0>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a é 好\n<unused0>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        2,
        1,
        0,
        3,
    )
    assert tokenizer.padding_side == "left" and tokenizer.chat_template is None
    theirs = GemmaTokenizer(vocab=tokenizer.get_vocab(), merges=merges_of(tokenizer.get_vocab()))
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(theirs)


def test_merges_are_every_cut_of_a_piece_in_the_pieces_order():
    vocab = {"abc": 9, "ab": 1, "a": 5, "b": 6, "c": 7, "bc": 8}
    assert merges_of(vocab) == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", "qwen2")
    settings, _ = read_gguf(tmp_path / "m.gguf")
    with pytest.raises(InputError, match="tokenizer of a qwen2 file: expected gpt2/qwen2, got gpt2/llama-bpe"):
        gguf_tokenizer(settings | {"tokenizer.ggml.pre": "llama-bpe"}, splits_digits=True)
    tokens = [*settings["tokenizer.ggml.tokens"]]
    kinds = [*settings["tokenizer.ggml.token_type"]]
    kinds[100] = 5  # a hole: ids of added tokens would shift
    with pytest.raises(InputError, match="expected id 259, got 258"):
        gguf_tokenizer(
            settings | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}, splits_digits=True
        )


TEXT = "x =  10\n    I'm 你好 😀<|im_end|>"
IDS = {
    "qwen2.5": [87, 284, 220, 220, 16, 15, 198, 262, 358, 2776, 220, 108386, 90316, 151645],
    "gemma": [2, 236781, 578, 138, 236770, 236771, 107, 140, 236777, 236789, 236757, 43758, 237389, 163543, 236820,
              236909, 548, 236779, 643, 111038],
}  # fmt: skip


@pytest.mark.host
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "gemma-3-270m"])
def test_ids_of_real_hosts(name):
    folder = cached_host(name)
    if folder is None:
        pytest.skip(f"hf-crouter host get {name}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT).input_ids == IDS[name.partition("-")[0]]
