"""Package mapping: the repository's top-level folders install inside ``mhc_megatron``.

With ``MHC_MEGATRON_NATIVE=1`` the host's extension is compiled too, for the torch that is
installed: ``pip install --no-build-isolation``.
"""

import os

from setuptools import find_packages, setup

MAPPED = ("kernels", "pipeline", "launch")

packages = find_packages(include=["mhc_megatron", "mhc_megatron.*"])
package_dir = {"mhc_megatron": "mhc_megatron"}
for folder in MAPPED:
    package_dir[f"mhc_megatron.{folder}"] = folder
    packages += [f"mhc_megatron.{p}" for p in find_packages(include=[folder, f"{folder}.*"])]

extensions = {}
if os.environ.get("MHC_MEGATRON_NATIVE") == "1":
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError as error:
        raise SystemExit(
            "MHC_MEGATRON_NATIVE=1 compiles for the torch that is installed, and none is found: "
            "install torch first, and give pip --no-build-isolation"
        ) from error

    replay = CppExtension(
        "mhc_megatron.kernels.native._replay",
        ["kernels/native/replay.cpp"],
        extra_compile_args=["-g0"],
    )
    extensions = {"ext_modules": [replay], "cmdclass": {"build_ext": BuildExtension}}

setup(packages=packages, package_dir=package_dir, **extensions)
