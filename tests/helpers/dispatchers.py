"""What Megatron's token dispatchers keep, let go of."""

import gc

from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher, _DispatchManager


def clear_dispatchers() -> None:
    """Empty all dispatchers of this process, whose models are not used any more.

    They keep the autograd graph of their last micro-batch, which leads through gradient hooks back
    to the model, its process groups and its memory: a circle that Python's collector cannot see.
    """
    kept = (MoETokenDispatcher, _DispatchManager)
    for dispatcher in [found for found in gc.get_objects() if isinstance(found, kept)]:
        vars(dispatcher).clear()
    gc.collect()
