"""Static metadata; imports nothing but setuptools. Versions are pinned in constraints.txt."""

from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithShipped(build_py):
    """A wheel carries the recipes and the batch script within the package; a checkout has them at its top."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in [*Path("configs").rglob("*.yaml"), *Path("slurm").glob("*.sbatch")]:
            target = Path(self.build_lib, "swin_scale", "shipped", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(
    name="swin_scale",
    version="0.1.0",
    description="Pretrain Swin Transformers at scale: exact resume, checkpoints without pickle, weights that convert",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["swin_scale*", "launcher*", "data_prep*"]),
    cmdclass={"build_py": BuildWithShipped},
    # The same sooner: without a compiler, or on another processor, Pillow resizes and the C library copies.
    ext_modules=[
        Extension(
            "swin_scale.data._resample",
            ["swin_scale/data/_resample.c"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        ),
        Extension("swin_scale.engine._stream", ["swin_scale/engine/_stream.c"], optional=True),
    ],
    package_data={"swin_scale": ["labels/*.tsv", "labels/*.txt", "kernels/tables/*.json"]},
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
            "scipy",
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
