"""Package mapping: the repository's top-level folders install inside ``mhc_megatron``."""

from setuptools import find_packages, setup

MAPPED = ("kernels", "pipeline", "launch")

packages = find_packages(include=["mhc_megatron", "mhc_megatron.*"])
package_dir = {"mhc_megatron": "mhc_megatron"}
for folder in MAPPED:
    package_dir[f"mhc_megatron.{folder}"] = folder
    packages += [f"mhc_megatron.{p}" for p in find_packages(include=[folder, f"{folder}.*"])]

setup(packages=packages, package_dir=package_dir)
