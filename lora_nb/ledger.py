"""Bytes of tensors that are alive, and operations, of whatever runs meanwhile: on real tensors and on fake ones."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# The processor's attention, which the counter of operations does not know, and its equal on a GPU, which it does.
SAME_FLOP = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


class Ledger(TorchDispatchMode):
    """While entered, counts the bytes of live tensors (`live`, `peak`) and the operations (`flop`), of real and fake tensors.

    A storage counts once, however many views it has, until the last of them is gone. What a kernel needs within one
    operation is not seen.
    """

    def __init__(self, *modules):
        """modules: models whose weights are there already."""
        super().__init__()
        self.live = self.peak = self.flop = 0
        self._watched = {}
        for module in modules:
            self.add(module.state_dict(keep_vars=True))
            self.add(list(module.buffers()))

    def add(self, tree) -> None:
        """Count the tensors in `tree` from now on."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._watched:
                    self._watched[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))
                    self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key, size):
        del self._watched[key]
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.add(out)
        packet = func._overloadpacket
        if packet in SAME_FLOP:
            self.flop += flop_registry[SAME_FLOP[packet]](*args[: 4 if "backward" in str(packet) else 3], out_val=out)
        elif packet in flop_registry:
            self.flop += flop_registry[packet](*args, **kwargs, out_val=out)
        return out
