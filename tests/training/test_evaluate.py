import pytest
import torch

from hf_crouter.training.evaluate import reconstruction_score

from ..tiny import CHUNK, VOCAB, tiny_crouter


def chunks(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (count, CHUNK), generator=generator)
    lengths = torch.randint(1, CHUNK + 1, (count, 1), generator=generator)
    return ids, (torch.arange(CHUNK) < lengths).long()


def test_means_are_over_real_tokens_whatever_the_batches():
    crouter, (ids, mask) = tiny_crouter(vocab_size=3), chunks()  # few tokens: some are right by chance
    ids %= 3
    score = reconstruction_score(crouter, ids, mask, batch_size=3)
    hits, nll = 0, 0.0
    for row, kept in zip(ids, mask.bool(), strict=True):
        alone = row[kept][None]
        logits = crouter(alone).logits.detach().double()[0]
        hits += int((logits.argmax(-1) == alone[0]).sum())
        nll -= float(logits.log_softmax(-1).gather(1, alone[0][:, None]).sum())
    assert hits > 0
    assert score.accuracy == pytest.approx(hits / int(mask.sum()))
    assert score.reconstruction_nll == pytest.approx(nll / int(mask.sum()), abs=1e-5)
    assert score.chunks == len(score.chunk_reconstruction_nll) == len(score.chunk_accuracy) == 7
    whole = reconstruction_score(crouter, ids, mask)
    torch.testing.assert_close(score.chunk_reconstruction_nll, whole.chunk_reconstruction_nll)


def test_without_a_mask_every_token_counts():
    crouter, (ids, _) = tiny_crouter(), chunks()
    score = reconstruction_score(crouter, ids)
    assert score.reconstruction_nll == pytest.approx(crouter(ids).loss.item(), abs=1e-5)
    assert score.accuracy == pytest.approx(float(score.chunk_accuracy.mean()))


def test_the_crouter_is_left_in_evaluation_mode_without_gradients():
    crouter = tiny_crouter().train()
    score = reconstruction_score(crouter, chunks()[0])
    assert not crouter.training and not score.chunk_reconstruction_nll.requires_grad


def test_bfloat16_is_near():
    crouter, (ids, mask) = tiny_crouter(), chunks()
    exact, near = (reconstruction_score(crouter, ids, mask, bf16=bf16) for bf16 in (False, True))
    assert near.reconstruction_nll == pytest.approx(exact.reconstruction_nll, rel=0.05)


def test_no_chunk_is_refused():
    with pytest.raises(ValueError, match="expected at least one chunk"):
        reconstruction_score(tiny_crouter(), torch.zeros(0, CHUNK, dtype=torch.long))
