"""Memory that tensors take, as far as Python sees them: what ops hold inside is not counted."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """A block in which the bytes of new storages are counted, while they live, and their peak."""

    def __init__(self, module):
        super().__init__()
        self.now = self.peak = 0
        self.known = {value.untyped_storage()._cdata for value in [*module.parameters(), *module.buffers()]}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and (key := value.untyped_storage()._cdata) not in self.known:
                storage = value.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key, size):
        self.now -= size
        self.known.discard(key)
