"""Compile the kernels that a training step launches, for Hopper, on a machine without a GPU.

    python tests/helpers/compile_kernels.py n=4 C=2560 dtype=bfloat16 projection=sinkhorn
    python tests/helpers/compile_kernels.py n=8 operations=post_pre kernels=mix_bwd,read_fwd
    python tests/helpers/compile_kernels.py n=4 hopper=1 kernels=hopper_pre_bwd
    PYTHONPATH=triton-3.3.1 python tests/helpers/compile_kernels.py n=4

Launches with tensors of no storage are recorded and compiled instead of run; TRITON_INTERPRET must
not be set. With ``hopper`` kernels of Hopper's own take the place of others. Prints registers,
spills and shared memory of each kernel, and how many of its loads are issued behind a product;
fails where one needs more shared memory than a multiprocessor has, or loads over what a product
still reads.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhc_megatron.kernels import MappingOptions
from mhc_megatron.kernels.triton import fp8_launch, head_launch, hopper, launch
from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.compiled import Launch
from mhc_megatron.kernels.triton.head_launch import HeadParameters
from mhc_megatron.kernels.triton.head_tiles import default_head_tiles
from mhc_megatron.kernels.triton.passes import POST, POST_PRE, PRE
from mhc_megatron.kernels.triton.plan import plan_of
from mhc_megatron.kernels.triton.tiles import default_tiles

SHARED_MEMORY = 227 * 1024
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
}
REBUILT = 5  # states, and one more branch input: a block of six sublayers


@dataclass
class Recorder:
    """What a kernel is launched with, by parameter, and its options."""

    kernel: triton.JITFunction
    launches: list = field(default_factory=list)

    def record(self, arguments: tuple, constants: dict, options: dict) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | constants
        assert set(values) == set(names), self.kernel.__name__
        self.launches.append((values, options))


@dataclass
class RecordedKernel:
    """Stands for a kernel that Triton itself launches."""

    recorder: Recorder

    def __getitem__(self, grid: tuple) -> object:
        def record(*arguments: object, num_warps: int, **constants: object) -> None:
            self.recorder.record(arguments, constants, {"num_warps": num_warps})

        return record


def compile_launch(recorder: Recorder, values: dict, options: dict) -> str:
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(recorder.kernel.arg_names):
        value = values[name]
        constant = recorder.kernel.params[index].is_constexpr or value is None
        if constant:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        if isinstance(value, tuple):
            signature[name] = tuple("constexpr" if v is None else TYPES[v.dtype] for v in value)
            constants |= {(index, i): None for i, v in enumerate(value) if v is None}
            attributes |= {
                (index, i): [["tt.divisibility", 16]] for i, v in enumerate(value) if v is not None
            }
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        attributes[(index,)] = [["tt.divisibility", 16]]
    source = source_of(recorder.kernel)(recorder.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shared = compiled.metadata.shared
    assert shared <= SHARED_MEMORY, (
        f"{recorder.kernel.__name__} needs {shared} bytes of shared memory"
    )
    overwritten = overwritten_tiles(compiled.asm["ttgir"])
    assert not overwritten, f"{recorder.kernel.__name__}: {overwritten}"
    found = f"{resources(compiled.asm['cubin'])}, shared memory {shared}"
    return f"{recorder.kernel.__name__}: {found}"


def source_of(kernel: triton.JITFunction) -> type:
    """What Triton compiles; before 3.6 there is no Gluon, and no kernel of it."""
    if hopper.hopper_pre_bwd is None or not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def overwritten_tiles(ttgir: str) -> list[str]:
    """Tiles in shared memory that a product reads beside later loads, and registers as well.

    Triton gives such a tile one place too few in its loop, so that a later load writes where the
    product still reads: results differ from run to run. A product that is waited for before the
    next load, as where its result is used in its own iteration, is none of these.
    """
    loads = set(re.findall(r"ttg\.local_load (%\w+)", ttgir))
    running: set[str] = set()
    found: set[str] = set()
    for line in ttgir.splitlines():
        product = re.search(r"warp_group_dot (%\w+), (%\w+), .*isAsync = true", line)
        if product:
            running.update(product.groups())
        elif "warp_group_dot_wait" in line and "pendings = 0" in line:
            running.clear()
        elif "ttg.async_copy" in line or "scf.yield" in line:
            found |= running & loads
    return sorted(found)


def resources(cubin: bytes) -> str:
    """Registers and bytes that are spilled, and of a kernel with a Hopper tensor core's products
    its late loads: of 16 bytes into registers, behind the first product. An iteration waits for all
    of their latency, unless something else is there to do."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return "no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", "--dump-sass", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found is not None
    text = f"registers {found[1]}, stack {found[2]}"
    _, product, behind = out.partition("HGMMA")
    if product:
        text += f", late loads {len(re.findall(r'LDG[.][^ ]*128', behind))}"
    return text


def record_launches() -> dict[str, Recorder]:
    """Of every kernel launched from now on, by its name."""
    recorders: dict[str, Recorder] = {}

    def recorder(kernel: triton.JITFunction) -> Recorder:
        return recorders.setdefault(kernel.__name__, Recorder(kernel))

    def record(self: Launch, grid: tuple, tensors: tuple, numbers: tuple = ()) -> None:
        recorder(self.kernel).record((*tensors, *numbers), self.constants, self.options)

    Launch.__call__ = record  # type: ignore[method-assign]
    launch.rebuild_fwd = RecordedKernel(recorder(launch.rebuild_fwd))
    return recorders


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ends_of_a_model(n: int, channels: int, dtype: torch.dtype) -> None:
    """Every launch of expand and of the contractions, with their backward."""
    tiles, tokens = default_head_tiles(n, dtype), 4096
    hidden, streams = meta(tokens, channels, dtype=dtype), meta(tokens, n, channels, dtype=dtype)
    parameters = HeadParameters(meta(n, n * channels), meta(1), meta(n))
    for divisor in (1, n):
        head_launch.expand(hidden, n, divisor=divisor, tile=tiles.copies)
        head_launch.contract(streams, divisor=divisor, tile=tiles.copies)
    eps = {"rms_eps": 1e-6, "eps": 1e-6}
    _, raw = head_launch.contract_learned(streams, parameters, **eps, tile=tiles.learned)
    for trains in (True, False):
        head_launch.contract_learned_backward(
            hidden, streams, raw, parameters, eps=1e-6, trains=trains, tiles=tiles
        )


# Whether there is a branch, whether in a single pass, whether with a norm.
OPERATIONS = {
    "pre": (False, False, False),
    "post_pre": (True, False, False),
    "single_pass": (True, True, False),
    "norm": (True, False, True),
}


def training_step(
    n: int,
    channels: int,
    dtype: torch.dtype,
    projection: str,
    operations: Sequence[str],
    tokens: int,
) -> None:
    """Every launch of post, a rebuild, and of ``operations`` with their backward."""
    options = MappingOptions(projection=projection)
    num_logits = options.num_logits(n)
    tiles = default_tiles(n, tokens, channels, dtype)
    streams, branch = meta(tokens, n, channels, dtype=dtype), meta(tokens, channels, dtype=dtype)
    packed = meta(n * (n + 2), tokens)
    alpha_res = None if projection == "identity" else meta(1)
    parameters = Parameters(
        meta(num_logits, n * channels), meta(1), meta(1), alpha_res, meta(num_logits)
    )
    post_operands = (streams, branch, None, packed)
    post_plan = plan_of(streams, branch)
    POST.forward(post_plan, None, *post_operands)
    POST.backward(post_plan, None, post_operands, (streams,), True, None)
    states, branches = [streams] * REBUILT, [branch] * REBUILT
    biases = [None, meta(channels, dtype=dtype), *[None] * (REBUILT - 2)]
    mixes, inputs = [packed] * (REBUILT + 1), [branch] * (REBUILT + 1)
    weights = [meta(channels, dtype=dtype), *[None] * REBUILT]
    inverse_rms = [meta(tokens), *[None] * REBUILT]
    norms = {"norm_weights": weights, "inverse_rms": inverse_rms}
    launch.rebuild(streams, branches, biases, mixes, states, inputs, **norms, tile=tiles.rebuild)
    of_norm = meta(channels, dtype=dtype)
    # With gradients of all results and parameters, and, of ``pre``, without.
    into = meta(num_logits, n * channels)
    for has_branch, single_pass, has_norm in map(OPERATIONS.__getitem__, operations):
        norm_weight = of_norm if has_norm else None
        kind = {"options": options, "single_pass": single_pass}
        for main_grad in (None, into) if has_branch and not (single_pass or has_norm) else (None,):
            plan = plan_of(
                streams,
                *((branch, None) if has_branch else (None, None)),
                norm_weight,
                accumulates=main_grad is not None,
                **kind,
            )
            operation = POST_PRE if has_branch else PRE
            operands = (*post_operands, *parameters) if has_branch else (streams, *parameters)
            results, kept = operation.forward(plan, None, *operands, norm_weight)
            saved, given = (*operands, norm_weight, *kept), (*results[:3], None)
            operation.backward(plan, None, saved, given, True, main_grad)
            if not has_branch:
                operation.backward(plan, None, saved, (*results[:2], None, None), False, None)


def messages(n: int, channels: int, dtype: torch.dtype) -> None:
    """A message in eight bits, packed and unpacked."""
    tensor = meta(4096, 1, n * channels, dtype=dtype)
    packed = meta(tensor.numel() + tensor.numel() // 128, dtype=torch.uint8)
    fp8_launch.pack(tensor, packed, 128)
    fp8_launch.unpack(packed, tensor, 128)


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=") for argument in arguments)
    sizes = (int(given.get("n", "4")), int(given.get("C", "2560")))
    dtype = getattr(torch, given.get("dtype", "bfloat16"))
    recorders = record_launches()
    if "hopper" in given:
        hopper.runs_on = lambda device: True  # type: ignore[assignment]
    operations = given.get("operations", ",".join(OPERATIONS)).split(",")
    projection, tokens = given.get("projection", "sinkhorn"), int(given.get("T", "4096"))
    training_step(*sizes, dtype, projection, operations, tokens)
    ends_of_a_model(*sizes, dtype)
    messages(*sizes, dtype)
    for recorder in recorders.values():
        name = recorder.kernel.__name__
        if name not in given.get("kernels", name).split(","):
            continue
        seen = []
        for values, options in recorder.launches:
            key = {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
            if key not in seen:
                seen.append(key)
                print(compile_launch(recorder, values, options), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
