import pytest
import torch

from hf_crouter.errors import MismatchError
from hf_crouter.utils.batching import check_ids, padded


def test_texts_are_padded_behind_and_masked():
    ids, mask = padded([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]


def test_both_go_to_the_device():
    assert {part.device.type for part in padded([torch.tensor([1])], "meta")} == {"meta"}


def test_ids_outside_the_vocabulary_are_refused():
    check_ids([torch.tensor([3]), torch.tensor([], dtype=torch.long)], 4)
    with pytest.raises(MismatchError, match="expected ids below 4"):
        check_ids([torch.tensor([1, 4])], 4)
