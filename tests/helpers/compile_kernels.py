"""Compile the kernels that a training step launches, for Hopper, on a machine without a GPU.

    python tests/helpers/compile_kernels.py n=4 C=2560 dtype=bfloat16 projection=sinkhorn

Launches with tensors of no storage are recorded and compiled instead of run; TRITON_INTERPRET must
not be set. Prints registers, spills and shared memory of each kernel, and fails where one needs
more shared memory than a multiprocessor has.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhc_megatron.kernels import MappingOptions
from mhc_megatron.kernels.triton import launch
from mhc_megatron.kernels.triton.arguments import Parameters
from mhc_megatron.kernels.triton.compiled import CompiledKernels
from mhc_megatron.kernels.triton.tiles import default_tiles

SHARED_MEMORY = 227 * 1024
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
REBUILT = 5  # states, and one more branch input: a block of six sublayers
KERNELS = (
    "split_weight",
    "mix_fwd",
    "post_fwd",
    "rebuild_fwd",
    "mix_bwd",
    "streams_bwd",
    "weight_bwd",
    "reduce_partials",
)


@dataclass
class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    name: str
    kernel: triton.JITFunction
    launches: list = field(default_factory=list)

    def __getitem__(self, grid: tuple) -> object:
        def record(*args: object, **kwargs: object) -> None:
            options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
            values = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}
            assert set(values) == set(self.kernel.arg_names), self.name
            self.launches.append((values, options))

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
    source = ASTSource(recorder.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shared = compiled.metadata.shared
    assert shared <= SHARED_MEMORY, f"{recorder.name} needs {shared} bytes of shared memory"
    return f"{recorder.name}: {resources(compiled.asm['cubin'])}, shared memory {shared}"


def resources(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return "no cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    assert found is not None
    return f"registers {found[1]}, stack {found[2]}"


def training_step(n: int, channels: int, dtype: torch.dtype, projection: str) -> list[Recorder]:
    """Every launch of post, a rebuild, and of pre, post_pre and single_pass with their backward."""
    kernels = {name: getattr(launch, name) for name in KERNELS}
    recorders = [
        Recorder(name, kernel.kernel if isinstance(kernel, CompiledKernels) else kernel)
        for name, kernel in kernels.items()
    ]
    for recorder in recorders:
        setattr(launch, recorder.name, recorder)
    options = MappingOptions(projection=projection)
    tiles, num_logits, tokens = default_tiles(n, channels, dtype), options.num_logits(n), 4096

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    streams, branch = meta(tokens, n, channels, dtype=dtype), meta(tokens, channels, dtype=dtype)
    packed = meta(n * (n + 2), tokens)
    alpha_res = None if projection == "identity" else meta(1)
    parameters = Parameters(
        meta(num_logits, n * channels), meta(1), meta(1), alpha_res, meta(num_logits)
    )
    launch.post(streams, branch, None, packed, tile=tiles.post)
    states, branches = [streams] * REBUILT, [branch] * REBUILT
    biases = [None, meta(channels, dtype=dtype), *[None] * (REBUILT - 2)]
    mixes, inputs = [packed] * (REBUILT + 1), [branch] * (REBUILT + 1)
    launch.rebuild(streams, branches, biases, mixes, states, inputs, tile=tiles.rebuild)
    backward = {"tile": tiles.streams_backward, "terms": tiles.product_terms}
    launch.streams_backward(
        streams, streams, branch, None, packed, None, single_pass=False, **backward
    )
    factors = launch.factor_weight(parameters.weight, streams)
    for has_branch, single_pass in ((False, False), (True, False), (True, True)):
        post = (branch, None, packed) if has_branch else (None, None, None)
        new_streams, u, raw, new_packed = launch.mix(
            streams,
            *post,
            factors,
            parameters,
            options=options,
            single_pass=single_pass,
            tile=tiles.mix,
        )
        projected, radial, partial = launch.mix_backward(
            new_streams,
            u,
            new_packed,
            raw,
            parameters,
            options=options,
            single_pass=single_pass,
            tile=tiles.mix_backward,
        )
        read = launch.ReadGradients(u, new_packed, projected, radial, factors)
        grad = streams if has_branch else None
        launch.streams_backward(grad, streams, *post, read, single_pass=single_pass, **backward)
    launch.parameter_backward(new_streams, projected, partial, parameters, tiles=tiles)
    return recorders


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=") for argument in arguments)
    recorders = training_step(
        int(given.get("n", "4")),
        int(given.get("C", "2560")),
        getattr(torch, given.get("dtype", "bfloat16")),
        given.get("projection", "sinkhorn"),
    )
    for recorder in recorders:
        if given.get("kernel", recorder.name) != recorder.name:
            continue
        seen = []
        for values, options in recorder.launches:
            key = {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
            if key not in seen:
                seen.append(key)
                print(compile_launch(recorder, values, options), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
