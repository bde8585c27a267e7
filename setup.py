"""Static metadata; imports nothing but setuptools. Versions are pinned in constraints.txt."""

from setuptools import Extension, find_packages, setup

setup(
    name="swin_scale",
    version="0.1.0",
    description="Pretrain Swin Transformers at scale: exact resume, checkpoints without pickle, weights that convert",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["swin_scale*", "launcher*", "data_prep*"]),
    # The same pixels sooner: without a compiler or on another processor Pillow resizes.
    ext_modules=[
        Extension(
            "swin_scale.data._resample",
            ["swin_scale/data/_resample.c"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ],
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
        "zlib-ng",
    ],
    extras_require={
        "triton": ["triton"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "timm",
            "torchvision",
            "triton; platform_system == 'Linux'",
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
