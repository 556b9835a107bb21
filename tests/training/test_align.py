import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_crouter import CompressedHistory, SoftPrompts
from hf_crouter.chunking import make_chunker
from hf_crouter.compressors.projector import Projector, find_projector
from hf_crouter.crouter.loading import load_crouter
from hf_crouter.data.prepare import load_tokenizer
from hf_crouter.data.tokens import TokenArray, encode_documents
from hf_crouter.errors import InputError
from hf_crouter.hosts.fingerprint import host_architecture
from hf_crouter.hosts.loading import load_host
from hf_crouter.training import align
from hf_crouter.training.align import (
    AlignArguments,
    AlignmentData,
    AlignmentLoss,
    collate,
    compressed_logits,
    cut_sample,
    train_alignment,
)

from ..data.samples import byte_tokenizer, library_documents
from ..tiny import CHUNK, VOCAB, tiny_crouter, tiny_host, tiny_projector
from ..trained_crouter import make_tokenizer
from .prepared import LENGTH, prepared

WINDOW, TARGET, FIRST = 10, 6, 4


def options(**changes):
    return AlignArguments(**{"output": "", "chunks": [1, 2], "window": WINDOW, "target": TARGET, "keep_first": FIRST,
                             "batch_size": 3, "hidden_size": 20, "steps": 4, "log_every": 1,
                             "warmup_steps": 2, "copy_share": 0.0, "rebuild_share": 0.0, **changes})  # fmt: skip


def array(*sizes, seed=0):
    """Documents of random ids."""
    drawn = np.random.default_rng(seed)
    pieces = [np.append(drawn.integers(3, VOCAB, size), 2) for size in sizes]
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    names = tuple(f"d{n}" for n in range(len(sizes)))
    return TokenArray(np.concatenate(pieces).astype(np.uint16), starts, names, names, 2, VOCAB)


def fixed_batch(data, chunks, index=0):
    """The first batch from `index` on with so many chunks."""
    return next(b for b in map(data.batch, range(index, index + 50)) if b.arguments[3].shape[1] == chunks).arguments


@pytest.fixture(scope="module")
def cross_tokenizer():
    """Tokens of a host with one token a byte, and the chunker for a crouter with larger ones."""
    crouter_tokenizer = make_tokenizer(text="".join(d.text for d in library_documents()))
    host_tokenizer = byte_tokenizer()
    documents = library_documents()
    tokens = encode_documents(documents, host_tokenizer, separator_id=0, workers=1)
    return tokens, make_chunker(CHUNK, host_tokenizer, crouter_tokenizer)


def test_a_sample_covers_the_ids_exactly_once():
    chunker, ids = make_chunker(CHUNK), np.arange(FIRST + 2 * CHUNK + WINDOW + TARGET)
    sample = cut_sample(ids, chunker, 2, options())
    parts = [sample.prefix, sample.chunks[sample.chunk_mask.bool()].numpy(), sample.window, sample.target]
    assert np.array_equal(np.concatenate(parts), ids)
    assert np.array_equal(sample.history, ids[:-TARGET])
    assert sample.chunks.shape == (2, CHUNK) and len(sample.prefix) == FIRST and len(sample.window) == WINDOW
    assert cut_sample(ids[:-1], chunker, 2, options()) is None
    assert cut_sample(ids[: FIRST + CHUNK], chunker, 2, options()) is None


def test_a_sample_of_two_tokenizers_covers_the_text_exactly_once(cross_tokenizer):
    tokens, chunker = cross_tokenizer
    ids = next(tokens.documents())[2].astype(np.int64)[:400]
    sample = cut_sample(ids, chunker, 3, options())
    decode, encode = chunker.host_tokenizer.decode, chunker.crouter_tokenizer
    middle = "".join(
        encode.decode(row[kept]) for row, kept in zip(sample.chunks, sample.chunk_mask.bool(), strict=True)
    )
    text = decode(sample.prefix) + middle + decode(sample.window) + decode(sample.target)
    used = len(sample.history) + len(sample.target)
    assert text == decode(ids[:used]) and np.array_equal(sample.history, ids[: used - TARGET])
    assert not chunker.same_tokenizer and used > FIRST + 3 * CHUNK + WINDOW + TARGET


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_training_sees_what_score_sees(family, chunks):
    host, crouter = tiny_host(family), tiny_crouter()
    projector = tiny_projector(host, crouter)
    ids = next(array(FIRST + chunks * CHUNK + WINDOW + TARGET, seed=chunks).documents())[2].astype(np.int64)
    sample = cut_sample(ids, make_chunker(CHUNK), chunks, options())
    module = AlignmentLoss(host, crouter, projector, 0.0).eval()
    soft = module.soft_prompts(sample.chunks[None], sample.chunk_mask[None])
    raw = torch.from_numpy(np.concatenate([sample.window, sample.target[:-1]]))[None]
    with torch.no_grad():
        logits = compressed_logits(host, soft, torch.from_numpy(sample.prefix)[None], raw, TARGET)
    trained = logits.log_softmax(-1).gather(2, torch.from_numpy(sample.target)[None, :, None])[..., 0]
    # the layout of the training window: no chunk is compressed while the target is read
    history = CompressedHistory(host, crouter, modes=[SoftPrompts(projector)], window=WINDOW, keep_first=FIRST)
    scored = history.score(torch.from_numpy(ids)[None], last=TARGET)
    assert len(history.report().chunks) == chunks
    history.detach()
    torch.testing.assert_close(trained, scored, atol=1e-4, rtol=1e-4)


def test_the_loss_is_next_token_loss_plus_divergence():
    host, crouter = tiny_host(), tiny_crouter()
    projector = tiny_projector(host, crouter)
    data = AlignmentData(array(200, 150), make_chunker(CHUNK), options(), 2)
    history, mask, prefix, chunks, chunk_mask, window, target = batch = fixed_batch(data, 2)
    out = AlignmentLoss(host, crouter, projector, 0.5)(*batch)
    with torch.no_grad():
        soft = AlignmentLoss(host, crouter, projector, 0.5).soft_prompts(chunks, chunk_mask)
        nll = kl = 0.0
        for row in range(3):  # slowly, one row and one target at a time
            for n in range(TARGET):
                raw = torch.cat([window[row], target[row, :n]])[None]
                embed = host.get_input_embeddings()
                inputs = torch.cat([embed(prefix[row : row + 1]), soft[row : row + 1], embed(raw)], 1)
                student = host(inputs_embeds=inputs).logits[0, -1].log_softmax(-1)
                past = history[row][mask[row].bool()]
                teacher = host(torch.cat([past, target[row, :n]])[None]).logits[0, -1].log_softmax(-1)
                nll -= float(student[target[row, n]]) / (3 * TARGET)
                kl += float((teacher.exp() * (teacher - student)).sum()) / (3 * TARGET)
    assert out["nll"].item() == pytest.approx(nll, rel=1e-4) and out["kl"].item() == pytest.approx(kl, rel=1e-3)
    assert out["loss"].item() == pytest.approx(nll + 0.5 * kl, rel=1e-4)
    alone = AlignmentLoss(host, crouter, projector, 0.0)(*batch)
    assert alone["loss"].item() == pytest.approx(nll, rel=1e-4) and alone["kl"] == 0


def test_the_divergence_is_0_where_student_and_teacher_read_the_same(monkeypatch):
    host, crouter = tiny_host(), tiny_crouter()
    data = AlignmentData(array(200, 150), make_chunker(CHUNK), options(), 2)
    batch = fixed_batch(data, 2)
    chunks = batch[3]
    module = AlignmentLoss(host, crouter, tiny_projector(host, crouter), 1.0)
    raw = host.get_input_embeddings()(chunks.flatten(1)).detach()
    monkeypatch.setattr(module, "soft_prompts", lambda *_: raw)  # the chunks themselves, token by token
    assert module(*batch)["kl"].item() == pytest.approx(0.0, abs=1e-5)


def test_left_padding_of_the_teacher_changes_nothing(cross_tokenizer):
    tokens, chunker = cross_tokenizer
    crouter = tiny_crouter(vocab_size=384)
    host = tiny_host(vocab_size=257, positions=512)
    data = AlignmentData(tokens, chunker, options(batch_size=2), 0)
    module = AlignmentLoss(host, crouter, tiny_projector(host, crouter), 1.0)
    batch = next(b.arguments for b in map(data.batch, range(50)) if not b.arguments[1].bool().all())
    both = module(*batch)
    rows = []
    for row in range(2):
        one = [tensor[row : row + 1] for tensor in batch]
        kept = one[1][0].bool()
        rows.append(module(one[0][:, kept], one[1][:, kept], *one[2:]))
    for name in ("loss", "nll", "kl"):
        assert both[name].item() == pytest.approx(sum(r[name].item() for r in rows) / 2, rel=1e-4)
    changed = [*batch]
    changed[0] = torch.where(batch[1].bool(), batch[0], 7)
    torch.testing.assert_close(module(*changed)["kl"], both["kl"])


def test_batches_of_two_tokenizers(cross_tokenizer):
    tokens, chunker = cross_tokenizer
    data = AlignmentData(tokens, chunker, options(), 0)
    assert data.length[2] - data.length[1] > CHUNK  # a crouter's token holds several of the host's
    history, mask, prefix, chunks, chunk_mask, window, target = fixed_batch(data, 2)
    assert chunks.shape == chunk_mask.shape == (3, 2, CHUNK) and history.shape == mask.shape
    assert window.shape == (3, WINDOW) and target.shape == (3, TARGET) and prefix.shape == (3, FIRST)
    assert (mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all() and int(chunks.max()) < 384
    for row in range(3):
        past = history[row][mask[row].bool()]
        assert torch.equal(past[:FIRST], prefix[row]) and torch.equal(past[-WINDOW:], window[row])


def test_a_batch_depends_on_its_number_alone():
    data = AlignmentData(array(200, 150), make_chunker(CHUNK), options(), 2)
    one, same, other = data.batch(5), data.batch(5), data.batch(6)
    assert all(torch.equal(a, b) for a, b in zip(one.arguments, same.arguments, strict=True))
    assert one.arguments[6].shape != other.arguments[6].shape or not torch.equal(one.arguments[6], other.arguments[6])
    assert {data.batch(n).arguments[3].shape[1] for n in range(20)} == {1, 2}
    counts = one.arguments[3].shape[1]
    assert one.real_tokens == 3 * (FIRST + counts * CHUNK + WINDOW + TARGET)


def test_windows_stay_inside_one_document():
    tokens = array(70, 66, 55)
    data = AlignmentData(tokens, make_chunker(CHUNK), options(chunks=[2]), 2)
    for n in range(30):
        history, target = data.batch(n).arguments[0], data.batch(n).arguments[6]
        assert not (history == 2).any() and not (target == 2).any()  # the separator


def test_rows_of_different_lengths_are_padded_on_the_left():
    chunker = make_chunker(CHUNK)
    sizes = (FIRST + CHUNK + WINDOW + TARGET, FIRST + CHUNK + WINDOW + TARGET)
    samples = [cut_sample(np.arange(3, 3 + size), chunker, 1, options()) for size in sizes]
    short = align.Sample(samples[0].history[5:], *(getattr(samples[0], n) for n in
                         ("prefix", "chunks", "chunk_mask", "window", "target")))  # fmt: skip
    history, mask = collate([samples[1], short], 2)[:2]
    assert mask[0].all() and mask[1].tolist() == [0] * 5 + [1] * (len(samples[0].history) - 5)
    assert (history[1, :5] == 2).all() and history[1, 5:].tolist() == samples[0].history[5:].tolist()


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"copy_share": 0.7, "rebuild_share": 0.4}, "expected shares of at most 1 together"),
     ({"rebuild_share": -0.1}, "expected shares"),
     ({"chunks": [1, 9]}, "expected documents of 164 tokens for 9 chunks, got none"), ({"chunks": []}, "at least one"),
     ({"chunks": [0]}, "at least one"), ({"window": 0}, "at least one"), ({"target": 0}, "at least one"),
     ({"chunks": [2]}, "expected at most 25 slots, which the host was trained on, got 28 for 2 chunks")],
)  # fmt: skip
def test_data_that_cannot_serve_is_refused(changes, match):
    with pytest.raises(InputError, match=match):
        AlignmentData(array(120, 110), make_chunker(CHUNK), options(**changes), 2,
                      25 if changes == {"chunks": [2]} else None, 4)  # fmt: skip


def test_windows_that_never_hold_enough_chunks_end_in_an_error(cross_tokenizer):
    tokens, chunker = cross_tokenizer
    data = AlignmentData(tokens, chunker, options(), 0)
    data.length = dict.fromkeys(data.length, 20)
    with pytest.raises(InputError, match="got fewer"):
        data.batch(0)


def test_tasks_end_in_what_stands_in_the_older_chunks():
    ids, chunker = np.arange(3, 80), make_chunker(CHUNK)
    plain = cut_sample(ids, chunker, 2, options())
    older = ids[FIRST : FIRST + 2 * CHUNK].tolist()
    for start_at in (0.0, 0.5, 0.99):
        copy = cut_sample(ids, chunker, 2, options(), "copy", start_at)
        assert len(copy.window) == WINDOW and len(copy.target) == TARGET // 2
        cue = next(n for n in range(1, WINDOW + 1) if copy.window[-n - 1 : -n].tolist() != [copy.window[-n] - 1])
        first = older.index(copy.window[-cue])
        assert older[first : first + cue + len(copy.target)] == [*copy.window[-cue:], *copy.target]
        assert copy.window[:-cue].tolist() == plain.window[: WINDOW - cue].tolist()
        assert copy.history.tolist() == [*ids[: FIRST + 2 * CHUNK], *copy.window]
    rebuild = cut_sample(ids, chunker, 2, options(), "rebuild")
    assert not len(rebuild.window) and rebuild.target.tolist() == older[: TARGET // 2]
    assert torch.equal(rebuild.chunks, plain.chunks) and rebuild.history.tolist() == [*ids[: FIRST + 2 * CHUNK]]


def test_every_task_gives_batches_and_a_loss():
    host, crouter = tiny_host(), tiny_crouter()
    module = AlignmentLoss(host, crouter, tiny_projector(host, crouter), 1.0)
    data = AlignmentData(array(120, 110), make_chunker(CHUNK), options(copy_share=0.4, rebuild_share=0.4), 2)
    windows = set()
    for index in range(20):
        arguments = data.batch(index).arguments
        assert torch.isfinite(module(*arguments)["loss"])
        windows.add((arguments[5].shape[1], arguments[6].shape[1]))
    assert windows == {(WINDOW, TARGET), (WINDOW, TARGET // 2), (0, TARGET // 2)}


def test_beyond_the_hosts_positions_there_is_no_teacher():
    host, crouter = tiny_host(positions=40), tiny_crouter()
    module = AlignmentLoss(host, crouter, tiny_projector(host, crouter), 1.0)
    data = AlignmentData(array(120), make_chunker(CHUNK), options(chunks=[1, 4]), 2, 40, 4)
    for chunks in (1, 4):
        out = module(*fixed_batch(data, chunks))
        assert (out["kl"] == 0) == (chunks == 4) and torch.isfinite(out["loss"])


@pytest.fixture
def pair(tmp_path):
    """Folders of a host, of a crouter and of the host's data; options that fit them."""
    data, tokenizer = prepared()
    torch.manual_seed(0)
    size = len(load_tokenizer(tokenizer))
    host = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
    ))  # fmt: skip
    host.save_pretrained(tmp_path / "tiny-host")
    shutil.copytree(tokenizer, tmp_path / "tiny-host", dirs_exist_ok=True)
    tiny_crouter(vocab_size=size, chunk_length=LENGTH).save_pretrained(tmp_path / "crouter")
    shutil.copytree(tokenizer, tmp_path / "crouter", dirs_exist_ok=True)
    return options(output=str(tmp_path / "out"), host=str(tmp_path / "tiny-host"), crouter=str(tmp_path / "crouter"),
                   data=str(data), steps=40, learning_rate=0.01)  # fmt: skip


def test_only_the_projector_is_trained(pair, monkeypatch):
    host, crouter = load_host(pair.host)[0], load_crouter(pair.crouter)[0]
    modules, loop = [], align.run_loop

    def kept(module, *arguments, **rest):
        modules.append((module, {n: p.detach().clone() for n, p in module.named_parameters()}))
        return loop(module, *arguments, **rest)

    monkeypatch.setattr(align, "run_loop", kept)
    record = train_alignment(pair)
    ((module, before),) = modules
    for name, after in module.named_parameters():
        assert torch.equal(before[name], after) != name.startswith("projector."), name
    for plain, used in ((host, module.host), (crouter, module.crouter)):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), used.parameters(), strict=True))
        assert not used.training and not any(p.requires_grad for p in used.parameters())
    assert record["steps"] == 40 and record["stage"] == "align" and set(record["final"]) == {"loss", "nll", "kl"}


def test_the_projector_learns_and_is_found_beside_the_crouter(pair):
    pair.steps, pair.seed = 120, 1
    record = train_alignment(pair)
    rows = [json.loads(line) for line in (Path(pair.output) / "log.jsonl").read_text().splitlines()]
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:40], rows[-40:]))
    assert last < first
    folder = Path(pair.crouter) / "projectors/tiny-host"
    assert record["path"] == str(folder)
    host, crouter = load_host(pair.host)[0], load_crouter(pair.crouter)[0]
    projector = find_projector(crouter, host)
    assert isinstance(projector, Projector)
    written = projector.config.training
    assert written == {key: value for key, value in record.items() if key != "path"}
    assert not any(str(value).startswith("/") for value in written["arguments"].values())
    assert projector.config.host_tokenizer == projector.config.crouter_tokenizer != ""
    assert projector.config.host_architecture == host_architecture(host)
    history = CompressedHistory(host, crouter, modes=[SoftPrompts()], window=WINDOW, keep_first=FIRST)
    ids = torch.from_numpy(
        next(TokenArray.load(Path(pair.data) / "train.safetensors").documents())[2][:120].astype(int)
    )
    assert torch.isfinite(history.score(ids[None], last=8)).all()
    history.detach()


def test_a_resumed_run_makes_the_same_projector(pair, monkeypatch):
    pair.steps, whole = 6, Path(pair.output)
    train_alignment(pair)
    folder = Path(pair.crouter) / "projectors/tiny-host/projector.safetensors"
    weights, draw = folder.read_bytes(), AlignmentData.batch

    def stops(self, index):
        if index == 4:
            raise KeyboardInterrupt
        return draw(self, index)

    monkeypatch.setattr(AlignmentData, "batch", stops)
    pair.output, pair.save_minutes = f"{whole}-parts", 0.0
    with pytest.raises(KeyboardInterrupt):
        train_alignment(pair)
    monkeypatch.undo()
    pair.resume = True
    train_alignment(pair)
    assert folder.read_bytes() == weights


def test_bfloat16_trains_float32_weights(pair, monkeypatch):
    pair.bf16, pair.steps = True, 2
    monkeypatch.setattr(Projector, "save", lambda self, *_, **__: dtypes.update(p.dtype for p in self.parameters()))
    dtypes = set()
    record = train_alignment(pair)
    assert dtypes == {torch.float32} and np.isfinite(record["final"]["loss"])


def test_what_does_not_fit_is_one_line(pair, tmp_path):
    def refused(match, **changes):
        values = {**pair.__dict__, **changes}
        with pytest.raises(InputError, match=match) as caught:
            train_alignment(AlignArguments(**values))
        assert "\n" not in str(caught.value) and not (Path(pair.crouter) / "projectors").exists()

    refused("expected a crouter's local folder", crouter=str(tmp_path / "missing"))
    refused("no such host folder", host=str(tmp_path / "missing"))
    refused("no such token file", data=str(tmp_path))
    refused("expected at most 256 slots", chunks=[200])
    refused("expected exactly one of", steps=None)
    other = tmp_path / "other"
    array(200).save(other / "train.safetensors")
    refused("expected data of the host's tokenizer with 384 entries, got one of 97", data=str(other))


def test_gradients_reach_only_the_projector():
    host, crouter = tiny_host(), tiny_crouter()
    module = AlignmentLoss(host, crouter, tiny_projector(host, crouter), 1.0).train()
    assert module.projector.training and not module.host.training and not module.crouter.training
    data = AlignmentData(array(200), make_chunker(CHUNK), options(), 2)
    module(*data.batch(0).arguments)["loss"].backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == name.startswith("projector."), name
