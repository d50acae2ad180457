"""The kernels compile for a GPU that is not there: the interpreter accepts more."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.compile_kernels import overwritten_tiles

SCRIPT = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"


def compiled_kernels(folder: Path, *arguments: str) -> list[str]:
    """The script's lines, a kernel each."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_every_kernel_of_a_training_step_compiles_for_hopper(tmp_path: Path) -> None:
    lines = compiled_kernels(tmp_path, "n=4", "C=1280")
    compiled = [line.partition(":")[0] for line in lines]
    # post, pre, post_pre and single_pass are variants of three of the kernels, and a norm of three;
    # of sums of phi pre has another number.
    variants = {"reduce_partials": 5, "mix_fwd": 4, "mix_bwd": 3, "streams_bwd": 3, "pre_bwd": 2}
    # With and without a divisor, with and without parameters that train.
    variants |= {"expand_fwd": 2, "contract_fwd": 2, "learned_streams_bwd": 2}
    names = ("split_weight", "mix_fwd", "post_fwd", "rebuild_fwd", "mix_bwd")
    names += ("streams_bwd", "pre_bwd", "weight_bwd", "reduce_partials")
    names += ("expand_fwd", "contract_fwd", "learned_fwd", "learned_weights_bwd")
    names += ("learned_streams_bwd", "reduce_head", "pack_blocks", "unpack_blocks")
    assert {name: compiled.count(name) for name in names} == {
        name: variants.get(name, 1) for name in names
    }
    large = [line for line in lines if line.startswith(("mix_fwd", "streams_bwd", "pre_bwd"))]
    assert [line for line in large if "stack 0," not in line] == []


def test_pre_of_many_tokens_fits_and_does_not_spill(tmp_path: Path) -> None:
    """It has a tile of its own there."""
    [line] = compiled_kernels(tmp_path, "n=4", "T=8192", "operations=pre", "kernels=mix_fwd")
    assert "stack 0," in line


def test_no_kernel_of_eight_streams_spills(tmp_path: Path) -> None:
    """Of a boundary: what ``post_pre`` launches, ``post`` alone, ``pre``'s own kernel, and a single
    pass, where more of a token is in registers."""
    variants = {"split_wide": 1, "post_fwd": 2, "project_fwd": 1, "read_fwd": 1, "mix_bwd": 1}
    variants |= {"wide_pre_bwd": 1, "reduce_partials": 2, "wide_streams_bwd": 2}
    selection = f"kernels={','.join(variants)}"
    lines = compiled_kernels(tmp_path, "n=8", "C=2560", "operations=post_pre", selection)
    compiled = [line.partition(":")[0] for line in lines]
    assert {name: compiled.count(name) for name in variants} == variants
    selection = "kernels=post_fwd,wide_pre_bwd,wide_streams_bwd"
    lines += compiled_kernels(tmp_path, "n=8", "C=2560", "operations=single_pass", selection)
    lines += compiled_kernels(tmp_path, "n=8", "C=2560", "operations=pre", "kernels=square_fwd")
    assert len(lines) == sum(variants.values()) + 6
    assert [line for line in lines if "stack 0," not in line] == []
    # A late one of a boundary takes a fifth of the kernel's time.
    waits = [line for line in lines if line.startswith("wide_pre_bwd")]
    assert len(waits) == 2
    assert [line for line in waits if "late loads 0," not in line] == []


@pytest.mark.parametrize(("n", "programs"), [(4, 3), (8, 2)])
def test_hoppers_own_kernel_leaves_room_for_as_many_programs_as_its_splits_count_on(
    tmp_path: Path, n: int, programs: int
) -> None:
    """And does not spill."""
    operations = "operations=pre" if n == 4 else "operations=pre,post_pre,single_pass"
    selection = operations, "hopper=1", "kernels=hopper_pre_bwd"
    lines = compiled_kernels(tmp_path, f"n={n}", "C=2560", *selection)
    assert len(lines) == (2 if n == 4 else 4)
    for line in lines:
        found = re.search(r"registers (\d+), stack 0, late loads 0, shared memory (\d+)", line)
        assert found is not None, line
        registers, shared = map(int, found.groups())
        assert programs * 128 * registers <= 65536
        assert programs * (shared + 1024) <= 228 * 1024


def test_hoppers_own_first_half_of_the_forward_does_not_spill(tmp_path: Path) -> None:
    """A multiprocessor has room for one program, whose copies are ahead of it."""
    selection = "operations=pre,post_pre,single_pass", "hopper=1", "kernels=hopper_mix_fwd"
    lines = compiled_kernels(tmp_path, "n=4", "C=2560", *selection)
    assert len(lines) == 3
    for line in lines:
        found = re.search(r"stack 0, late loads 0, shared memory (\d+)", line)
        assert found is not None, line
        assert int(found[1]) + 1024 <= 228 * 1024


@pytest.mark.parametrize("n", [2, 4])
def test_hoppers_own_kernel_of_phis_gradient_does_not_spill(tmp_path: Path, n: int) -> None:
    selection = "operations=post_pre", "hopper=1", "kernels=hopper_weight_bwd"
    (line,) = compiled_kernels(tmp_path, f"n={n}", "C=2560", *selection)
    found = re.search(r"stack 0, late loads 0, shared memory (\d+)", line)
    assert found is not None, line
    assert int(found[1]) + 1024 <= 228 * 1024


def test_a_tile_that_registers_and_a_running_product_read_is_found() -> None:
    """As the compiler wrote it for a kernel whose results differed from run to run."""
    product = "%p = ttng.warp_group_dot %y, %w, %sum {isAsync = true} : !ttg.memdesc<128x64xbf16>\n"
    load = "%r = ttg.local_load %y token %t : !ttg.memdesc<128x64xbf16> -> tensor<128x64xbf16>\n"
    copy = "%c = ttg.async_copy_global_to_local %pointers, %place : <128x64xbf16>\n"
    wait = "%q = ttng.warp_group_dot_wait %p, %y, %w {pendings = N : i32} : tensor<128x64xf32>\n"
    waited, left_running = wait.replace("N", "0"), wait.replace("N", "1")
    for later in (copy, "scf.yield %p\n"):
        assert overwritten_tiles(load + product + later) == ["%y"]
        assert overwritten_tiles(load + product + left_running + later) == ["%y"]
        assert overwritten_tiles(load + product + waited + later) == []
        assert overwritten_tiles(load.replace("%y", "%z") + product + later) == []
        assert overwritten_tiles(load + product.replace("isAsync = true", "") + later) == []
