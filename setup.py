"""Installation. `kernels/` and `data_tools/` are installed as megaprior.kernels and megaprior.data_tools only.

They are reached through two relative links inside `megaprior/`, so that the same import works from the repository's root,
from elsewhere, editable or as a wheel. A top-level package `kernels` must never be installed: Hugging Face publishes a
distribution of that name and transformers probes for it.

With MEGAPRIOR_BUILD_CUDA=1 in the environment nvcc compiles the CUDA kernels too, into megaprior/kernels/_cuda_sm90.so.
Without it nothing is compiled and no compiler is needed.
"""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


def cuda_build():
    """kernels/cuda/build.py, by its path: while a wheel is built nothing of ours can be imported."""
    spec = spec_from_file_location("cuda_build", Path(__file__).resolve().parent / "megaprior/kernels/cuda/build.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CUDA = cuda_build()


class BuildCuda(build_ext):
    """The library is no Python module: nvcc makes it, and its name does not say which Python runs."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        try:
            CUDA.build_library(Path(self.get_ext_fullpath(ext.name)))
        except RuntimeError as error:
            sys.exit(f"megaprior: {error}")


class WheelForAnyPython(bdist_wheel):
    """With the library a wheel is for one kind of machine, but still for every Python."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


def cuda_extensions():
    if not CUDA.wanted():
        return []
    try:
        CUDA.find_nvcc()  # before anything else is done
    except RuntimeError as error:
        sys.exit(f"megaprior: {error}")
    return [Extension("megaprior.kernels." + Path(CUDA.LIBRARY).stem, sources=[])]


TEST = [
    "pytest>=8.0",
    "hypothesis>=6.100",
    "openmpi>=5.0; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'",  # mpirun, for real ranks
    "triton>=3.4; platform_system == 'Linux'",  # torch's CUDA builds bring it; its interpreter and compiler need no GPU
]

setup(
    name="megaprior",
    version="0.1.0",
    description="Vision-language pre-training that prioritizes image-related tokens (PRIOR)",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megaprior", "megaprior.*"]),
    package_data={
        "megaprior.analysis": ["templates/*"],
        "megaprior.export": ["templates/*"],
        "megaprior.kernels.cuda": ["*.cu", "*.h"],
    },
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": BuildCuda, "bdist_wheel": WheelForAnyPython},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.3",
        "transformers>=5.0",
        "accelerate>=1.1",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "protobuf>=4.25",
        "tiktoken>=0.8",
        "tokenizers>=0.21",
        "numpy>=1.26",
        "mpi4py>=4.0",
        "pillow>=10.3",
        "pyarrow>=17.0",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "xxhash>=3.4",
        "rich>=13.7",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "scipy>=1.12",
        "tensorboard>=2.16",
        "ninja>=1.11",
    ],
    extras_require={
        "flash": ["flash-attn>=2.6"],
        "wandb": ["wandb>=0.31"],
        "test": TEST,
        "dev": [*TEST, "ruff>=0.8", "pyright>=1.1.390"],
    },
    entry_points={
        "console_scripts": [
            "megaprior = megaprior.cli:main",
            "megaprior-data = megaprior.data_tools.cli:main",
        ]
    },
)
