"""Which attention Transformer Engine has chosen; and whose cuDNN it finds."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mhc_megatron.megatron.attention import attention_kernels

MODULE = "transformer_engine.pytorch.attention.dot_product_attention"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, None),
        ({"use_flash_attention": None, "use_unfused_attention": None}, None),
        ({"use_flash_attention": True}, "flash"),
        ({"use_flash_attention": False, "use_fused_attention": True}, "fused"),
        ({"use_fused_attention": False, "use_unfused_attention": True}, "unfused"),
    ],
)
def test_the_choice_is_transformer_engines(
    chosen: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention_kernels() is None
    module = ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, module)
    assert attention_kernels() is None  # another release's
    module._attention_backends = chosen  # type: ignore[attr-defined]
    assert attention_kernels() == expected


SCRIPT = """
import ctypes, os, sys
import mhc_megatron.cudnn as cudnn
torchs, systems = sys.argv[1:]
ctypes.CDLL(torchs + "/libcudnn.so.9")  # by torch, for itself alone
cudnn.torch.backends.cudnn.version = lambda: None
cudnn.load_torchs_cudnn()
# As Transformer Engine does, where it does not look at CUDNN_HOME.
ctypes.CDLL(systems + "/libcudnn.so", mode=ctypes.RTLD_GLOBAL)
print(ctypes.CDLL(None).cudnnGetVersion(), os.environ["CUDNN_HOME"])
"""


def test_torchs_cudnn_goes_before_the_systems(tmp_path: Path) -> None:
    """Two libraries of one name, of which the second asks to be everybody's."""
    folders = []
    for folder, version in (("torchs", 91900), ("systems", 91400)):
        (tmp_path / folder).mkdir()
        source = tmp_path / folder / "version.c"
        source.write_text(f"int cudnnGetVersion(void) {{ return {version}; }}\n")
        library = tmp_path / folder / "libcudnn.so.9"
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source],
            check=True,
        )
        (tmp_path / folder / "libcudnn.so").symlink_to(library)
        folders.append(str(tmp_path / folder))
    environment = {name: value for name, value in os.environ.items() if name != "CUDNN_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout.split() == ["91900", folders[0]]
