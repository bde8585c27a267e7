"""The verb `shards`: flags, exit codes, and a quick start."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep.cli import add_parser
from data_prep.digits import write_digit_folders
from data_prep.write import write_shards
from swin_scale.errors import UserError


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["shards", *map(str, arguments)])
    return args.handler(args)


def test_verbs_end_to_end(tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("write", tree, out, "--shard-bytes", "64K", "--workers", 1) == 0
    assert "60 samples, 3 shards, 3 classes" in capsys.readouterr().out
    assert run("index", out, "--workers", 1) == 0
    assert run("verify", out, "--workers", 1) == 0
    assert "clean" in capsys.readouterr().out
    assert run("stats", out) == 0
    assert "20 min, 20 median, 20 max" in capsys.readouterr().out
    assert run("sample", out, tmp_path / "look", "-n", 2) == 0
    assert len(list((tmp_path / "look").iterdir())) == 2
    (out / "shard-000001.tar").unlink()
    assert run("verify", out, "--workers", 1) == 3
    assert "shard-000001.tar" in capsys.readouterr().out
    assert run("repair", out, "--dry-run", "--workers", 1) == 0
    assert "would have" in capsys.readouterr().out and not (out / "lost.jsonl").exists()
    assert run("repair", out, "--workers", 1) == 0
    assert "lost: shard-000001.tar: the tar is missing" in capsys.readouterr().out and (out / "lost.jsonl").exists()
    assert run("verify", out, "--workers", 1) == 0


def test_val_takes_the_classes_of_train(tree, written, tmp_path):
    assert run("write", tree, tmp_path / "out", "--classes", written, "--workers", 1) == 0
    with pytest.raises(SystemExit):
        run("write", tree, tmp_path / "out", "--shard-bytes", "many")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, argparse, data_prep.cli as cli; cli.add_parser(argparse.ArgumentParser().add_subparsers()); "
        "before = {'numpy', 'PIL'} & set(sys.modules); "
        "import data_prep.write, data_prep.index, data_prep.verify, data_prep.stats, data_prep.digits; "
        "print(before, {'torch', 'webdataset'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set() set()"


def test_digit_folders(tmp_path):
    train, val = write_digit_folders(tmp_path, val_per_class=1)
    assert [len(list(folder.glob("*/*.png"))) for folder in (train, val)] == [4990, 10]
    names = [{path.name for path in folder.glob("*/*.png")} for folder in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 5000
    with Image.open(next(val.glob("7/*.png"))) as image:
        assert image.size == (32, 32) and image.mode == "L" and image.getextrema()[1] > 200
    manifest = write_shards(val, tmp_path / "shards", workers=1)
    assert manifest.classes == tuple("0123456789") and manifest.wnids is None
    with pytest.raises(UserError, match="val_per_class is 500"):
        write_digit_folders(tmp_path, val_per_class=500)
