"""A tensor without its memory, between a forward and what fills it again."""

from torch import Tensor


class Dropped:
    """A tensor's memory, emptied until ``restore``. The alias has no graph and no version."""

    def __init__(self, tensor: Tensor) -> None:
        self.alias = tensor.data
        storage = self.alias.untyped_storage()
        self._size = storage.nbytes()
        assert self.alias.numel() * self.alias.element_size() == self._size, "memory is shared"
        storage.resize_(0)

    def restore(self) -> Tensor:
        """The memory again, not yet filled."""
        self.alias.untyped_storage().resize_(self._size)
        return self.alias

    def drop(self) -> None:
        """Empty it once more."""
        self.alias.untyped_storage().resize_(0)
