"""The kernels compile for a GPU that is not there: the interpreter accepts more."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"


def test_every_kernel_of_a_training_step_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), "n=4", "C=1280"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [line.partition(":")[0] for line in done.stdout.splitlines()]
    # post, pre, post_pre and single_pass are variants of three of the kernels, and a norm of three.
    variants = {"reduce_partials": 3, "mix_fwd": 4, "mix_bwd": 3, "streams_bwd": 3, "pre_bwd": 2}
    # With and without a divisor, with and without parameters that train.
    variants |= {"expand_fwd": 2, "contract_fwd": 2, "learned_streams_bwd": 2}
    names = ("split_weight", "mix_fwd", "post_fwd", "rebuild_fwd", "mix_bwd")
    names += ("streams_bwd", "pre_bwd", "weight_bwd", "reduce_partials")
    names += ("expand_fwd", "contract_fwd", "learned_fwd", "learned_weights_bwd")
    names += ("learned_streams_bwd", "reduce_head", "pack_blocks", "unpack_blocks")
    assert {name: compiled.count(name) for name in names} == {
        name: variants.get(name, 1) for name in names
    }
