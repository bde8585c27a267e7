"""Static metadata; imports nothing but setuptools. Versions are pinned in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="swin_scale",
    version="0.1.0",
    description="Pretrain Swin Transformers at scale: exact resume, checkpoints without pickle, weights that convert",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["swin_scale*", "launcher*", "data_prep*"]),
    package_data={"swin_scale": ["labels/*.tsv", "labels/*.txt"]},
    install_requires=[
        "torch>=2.10",
        "numpy",
        "deepspeed>=0.19.8,<0.20",
        "webdataset>=1.0",
        "safetensors",
        "pillow",
        "pyyaml",
        "tensorboard",
        "tqdm",
        "xxhash",
    ],
    extras_require={
        "triton": ["triton"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "timm",
            "torchvision",
            "transformers",
            "yacs",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["swin-scale = swin_scale.cli:main"]},
)
