import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.proof
def test_an_installed_package_has_its_recipes_and_its_batch_script(tmp_path):
    source = tmp_path / "source"  # building leaves files behind
    for name in ("swin_scale", "launcher", "data_prep", "configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*wheel, tmp_path, source], check=True, cwd=tmp_path, timeout=300)
    (built,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(built).extractall(site)
    for room, pattern in (("configs", "**/*.yaml"), ("slurm", "*.sbatch")):
        installed = site / "swin_scale" / "shipped" / room
        ours = {path.relative_to(ROOT / room): path.read_bytes() for path in (ROOT / room).glob(pattern)}
        assert ours
        assert {path.relative_to(installed): path.read_bytes() for path in installed.glob(pattern)} == ours
    command = [sys.executable, "-m", "swin_scale", "configs", "show", "demo"]
    shown = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=240)
    assert shown.returncode == 0, shown.stderr
    listed = "import swin_scale.recipes as r, launcher.render as l; print(*r.recipes().values(), l.TEMPLATE)"
    paths = subprocess.run([sys.executable, "-c", listed], cwd=site, capture_output=True, text=True, check=True)
    assert all(Path(path).is_relative_to(site) for path in paths.stdout.split())
