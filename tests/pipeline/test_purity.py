"""Schedules need no torch: they are made, checked and drawn before there is a GPU."""

import subprocess
import sys

# All but the executor's modules, which a rank imports that has torch.
PURE = (
    "actions",
    "blocks",
    "boxes",
    "catalogue",
    "costs",
    "dataflow",
    "draw",
    "dual",
    "errors",
    "lower",
    "measure",
    "memory",
    "placement",
    "recompute",
    "rows",
    "schedule",
    "schedules",
    "simulate",
    "text",
    "timeline",
    "trace",
    "validate",
)


def test_import_and_run_with_torch_blocked() -> None:
    code = (
        "import importlib, sys\n"
        "sys.modules.update(torch=None, megatron=None, triton=None)\n"
        f"for name in {PURE}: importlib.import_module(f'mhc_megatron.pipeline.{{name}}')\n"
        "from mhc_megatron.launch import cli\n"
        "sys.exit(cli.main(['simulate', '--schedule', 'gpipe', '--ranks', '2', "
        "'--micro-batches', '2']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
