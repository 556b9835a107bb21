import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_crouter.chunking import make_chunker, tokenizer_fingerprint
from hf_crouter.errors import InputError

TEXT = (
    "def f(x):\n    return x  # naïve façade, 数学 and 🙂🙃 emoji\n\n"
    "The quick brown fox jumps over the lazy dog; " * 3 + "\t\tΩmega ünïcode 日本語のテキスト 😀😃😄😁 end.\n"
) * 6


def byte_tokenizer(vocab_size, corpus=TEXT, prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([corpus], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace_tokenizer():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def encode(tokenizer, text=TEXT):
    return tokenizer.encode(text, add_special_tokens=False)


class TestSameTokenizer:
    def test_spans_of_exactly_one_chunk(self):
        chunks = make_chunker(16).chunk(list(range(70)), start=3)
        assert chunks.spans == ((3, 19), (19, 35), (35, 51), (51, 67))
        assert torch.equal(chunks.input_ids, torch.arange(3, 67).view(4, 16))
        assert chunks.attention_mask.all()

    def test_ragged_tail(self):
        chunks = make_chunker(16).chunk(list(range(70)), start=3, final=True)
        assert chunks.spans[-1] == (67, 70) and len(chunks) == 5
        assert chunks.attention_mask[-1].tolist() == [1] * 3 + [0] * 13
        assert chunks.input_ids[-1].tolist() == [67, 68, 69] + [0] * 13

    def test_nothing_to_cut(self):
        assert make_chunker(16).next_chunk([1, 2, 3], 0) is None
        assert make_chunker(16).next_chunk([1, 2, 3], 3, final=True) is None
        assert len(make_chunker(16).chunk([], final=True)) == 0

    def test_limit(self):
        assert len(make_chunker(16).chunk(list(range(70)), limit=2)) == 2


class TestCrossTokenizer:
    @pytest.fixture(params=["coarse host", "fine host", "metaspace host"])
    def pair(self, request):
        if request.param == "metaspace host":
            return metaspace_tokenizer(), byte_tokenizer(400)
        sizes = (600, 300) if request.param == "coarse host" else (280, 600)
        return tuple(byte_tokenizer(size) for size in sizes)

    @pytest.mark.parametrize("length", [32, 64, 200])
    def test_chunks_cover_the_text_and_fit(self, pair, length):
        host, crouter = pair
        chunker, ids = make_chunker(length, *pair), encode(host)
        chunks = chunker.chunk(ids, final=True)
        assert [s[0] for s in chunks.spans] == [0, *(s[1] for s in chunks.spans[:-1])]
        assert chunks.spans[-1][1] == len(ids)
        text = ""
        for row, mask in zip(chunks.input_ids, chunks.attention_mask, strict=True):
            assert 1 <= mask.sum() <= length and mask[: int(mask.sum())].all()
            piece = crouter.decode(row[mask.bool()])
            assert "\ufffd" not in piece
            text += piece
        assert text.strip() == host.decode(ids).strip()
        full = [int(mask.sum()) for mask in chunks.attention_mask[:-1]]
        assert sum(full) / len(full) > 0.8 * length  # full but for the tokens that straddle a cut

    def test_a_chunk_does_not_depend_on_the_text_after_it(self, pair):
        chunker, ids = make_chunker(32, *pair), encode(pair[0])
        found = chunker.next_chunk(ids, 5)
        known = next(n for n in range(len(ids)) if chunker.next_chunk(ids[:n], 5) is not None)
        assert all(chunker.next_chunk(ids[:n], 5) == found for n in range(known, known + 60))
        assert chunker.next_chunk(ids[:known] + [7] * 30, 5) == found
        assert (known - 5) % chunker.step == 0
        assert known - found[0] <= 3 * chunker.step

    def test_streaming_equals_all_at_once(self, pair):
        chunker, ids = make_chunker(32, *pair), encode(pair[0])[:400]
        spans, start = [], 0
        for n in range(len(ids) + 1):
            while (found := chunker.next_chunk(ids[:n], start)) is not None:
                spans.append((start, found[0]))
                start = found[0]
        assert tuple(spans) == chunker.chunk(ids).spans

    def test_never_inside_a_character(self):
        host, crouter = byte_tokenizer(257), byte_tokenizer(300)
        ids = encode(host, "🙂🙃😀" * 40)  # one byte a host token, four bytes a character
        chunker = make_chunker(10, host, crouter)
        for start, end in chunker.chunk(ids, final=True).spans:
            assert "\ufffd" not in host.decode(ids[start:end])

    def test_bytes_that_are_no_text_end_all_the_same(self):
        host, crouter = byte_tokenizer(257), byte_tokenizer(300)
        broken = host.convert_tokens_to_ids("ð")
        chunks = make_chunker(10, host, crouter).chunk([broken] * 100, final=True)
        assert chunks.spans[-1][1] == 100

    def test_a_host_token_longer_than_a_chunk(self):
        host, crouter = byte_tokenizer(400, "a" * 9000), byte_tokenizer(257, "b")
        ids = encode(host, "a" * 256)
        with pytest.raises(InputError, match="at most 2 crouter tokens"):
            make_chunker(2, host, crouter).chunk(ids, final=True)

    def test_both_or_none(self):
        with pytest.raises(InputError, match="crouter's is missing"):
            make_chunker(16, byte_tokenizer(300))


class TestTokenizerFingerprint:
    def test_settings_that_do_not_change_ids_do_not_count(self, tmp_path):
        tokenizer = byte_tokenizer(300)
        before = tokenizer_fingerprint(tokenizer)
        tokenizer.chat_template, tokenizer.padding_side = "{{ messages }}", "left"
        tokenizer.add_special_tokens({"eos_token": "!"})
        tokenizer.save_pretrained(tmp_path)
        assert tokenizer_fingerprint(tokenizer) == before
        assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == before

    def test_vocabulary_and_pre_tokenizer_count(self):
        prints = {tokenizer_fingerprint(byte_tokenizer(size)) for size in (300, 301)}
        prints.add(tokenizer_fingerprint(byte_tokenizer(300, prefix_space=True)))
        assert len(prints) == 3

    def test_equal_tokenizers_share_their_ids(self):
        assert make_chunker(16, byte_tokenizer(300), byte_tokenizer(300)).same_tokenizer
        assert not make_chunker(16, byte_tokenizer(300), byte_tokenizer(301)).same_tokenizer
