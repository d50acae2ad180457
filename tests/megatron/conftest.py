"""Which tests need Megatron's own training loop."""

from packaging.version import Version

from mhc_megatron.megatron.compat import core_version

# Of the two tested releases of megatron-core one has the training loop; test_training_loop.py
# shows that the other is refused.
_OF_THE_LOOP = ["test_pretrain.py", "test_loop_upcycle.py"]
collect_ignore = [] if core_version() >= Version("0.19") else _OF_THE_LOOP
