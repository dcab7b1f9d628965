"""Installation. `kernels/` and `data_tools/` are installed as megaprior.kernels and megaprior.data_tools only.

They are reached through two relative links inside `megaprior/`, so that the same import works from the repository's root,
from elsewhere, editable or as a wheel. A top-level package `kernels` must never be installed: Hugging Face publishes a
distribution of that name and transformers probes for it.
"""

from setuptools import find_packages, setup

TEST = [
    "pytest>=8.0",
    "hypothesis>=6.100",
    "triton>=3.4; platform_system == 'Linux'",  # torch's CUDA builds bring it; its interpreter and compiler need no GPU
]

setup(
    name="megaprior",
    version="0.1.0",
    description="Vision-language pre-training that prioritizes image-related tokens (PRIOR)",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megaprior", "megaprior.*"]),
    package_data={"megaprior.analysis": ["templates/*"], "megaprior.export": ["templates/*"]},
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
