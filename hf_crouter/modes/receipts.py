"""Which tokens of a call came from the archive: noted before they are chosen, told once they are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch

from ..ngram.candidates import Proposals
from ..ngram.suffix_index import LONGEST


class Receipts(Protocol):
    """What a copier notes at every step."""

    def chosen(self, input_ids: torch.Tensor) -> None:
        """Called at every step before anything is searched, with what stands there `[B, T]`."""
        ...

    def note(self, proposals: Proposals, brought: torch.Tensor, sizes: Sequence[int], input_ids: torch.Tensor) -> None:
        """Remembers which tokens would come from the archive.

        Args:
            proposals: at one position a row.
            brought: `C`, bool: the archive brings it.
            sizes: archived tokens of each row.
            input_ids: `[B, T]`, what stands before.
        """
        ...

    def settle(self, sequences: torch.Tensor) -> None:
        """Called with what the call gave, `[sequences, T]`, before something is asked."""
        ...

    def size(self, sequence: int, ids: torch.Tensor, column: int) -> int | None:
        """Archived tokens when a sequence's token `ids[column]` came from the archive; None where it did not."""
        ...

    def key(self, sequence: int, ids: torch.Tensor, column: int) -> Hashable:
        """Tells the tokens of a call apart."""
        ...


class GrowingReceipts:
    """Where every step's ids are those of the step before and one more a row: nothing waits for the device.

    What a step would bring is kept until the next one says which token was chosen.
    """

    def __init__(self):
        self._open: tuple[int, Proposals, torch.Tensor, tuple[int, ...]] | None = None
        self._taken: list[tuple[int, torch.Tensor, tuple[int, ...]]] = []  # columns; of each row: whether, sizes
        self._known: dict[int, tuple[list[bool], tuple[int, ...]]] = {}

    def note(self, proposals: Proposals, brought: torch.Tensor, sizes: Sequence[int], input_ids: torch.Tensor) -> None:
        """See `Receipts.note`."""
        self._open = input_ids.shape[1], proposals, brought, tuple(sizes)

    def chosen(self, input_ids: torch.Tensor) -> None:
        """See `Receipts.chosen`."""
        if self._open is None or input_ids.shape[1] <= self._open[0]:
            return
        column, proposals, brought, sizes = self._open
        targets = input_ids[:, column].to(brought.device)
        self._taken.append((column, proposals.of(targets, brought.float()) > 0, sizes))
        self._open = None

    def settle(self, sequences: torch.Tensor) -> None:
        """See `Receipts.settle`."""
        self.chosen(sequences)
        if self._taken:
            taken = torch.stack([hits for _, hits, _ in self._taken]).tolist()
            self._known |= {column: (hits, sizes)
                            for (column, _, sizes), hits in zip(self._taken, taken, strict=True)}  # fmt: skip
            self._taken = []

    def size(self, sequence: int, ids: torch.Tensor, column: int) -> int | None:
        """See `Receipts.size`."""
        hits, sizes = self._known.get(column, (None, ()))
        return sizes[sequence] if hits is not None and hits[sequence] else None

    def key(self, sequence: int, ids: torch.Tensor, column: int) -> Hashable:
        """See `Receipts.key`."""
        return sequence, column


class BranchingReceipts:
    """Where rows may change places or be taken back (beams, drafts): tokens are known by what stands before them.

    Args:
        prompts: rows of the prompt; beams and several sequences make more of them.
    """

    def __init__(self, prompts: int):
        self.prompts = prompts
        self._brought: dict[Hashable, dict[int, int]] = {}  # tokens, and the archive's at that time
        self._sequences = prompts

    def chosen(self, input_ids: torch.Tensor) -> None:
        """See `Receipts.chosen`; nothing is open."""

    def note(self, proposals: Proposals, brought: torch.Tensor, sizes: Sequence[int], input_ids: torch.Tensor) -> None:
        """See `Receipts.note`."""
        rows, tokens = proposals.named(brought)
        keys: dict[int, Hashable] = {}
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            if row not in keys:
                keys[row] = _key(row * self.prompts // len(input_ids), input_ids[row])
            self._brought.setdefault(keys[row], {})[token] = sizes[row]

    def settle(self, sequences: torch.Tensor) -> None:
        """See `Receipts.settle`."""
        self._sequences = len(sequences)

    def size(self, sequence: int, ids: torch.Tensor, column: int) -> int | None:
        """See `Receipts.size`."""
        return self._brought.get(self.key(sequence, ids, column), {}).get(int(ids[column])) if self._brought else None

    def key(self, sequence: int, ids: torch.Tensor, column: int) -> Hashable:
        """See `Receipts.key`."""
        return _key(sequence * self.prompts // self._sequences, ids[:column])


def _key(prompt: int, ids: torch.Tensor) -> Hashable:
    """Tells steps of different rows apart without reading all their ids."""
    return prompt, len(ids), hash(ids[-LONGEST:].cpu().numpy().tobytes())
