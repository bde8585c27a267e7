"""Writing shards: the same bytes whatever happens, images untouched, bad ones listed."""

import fcntl
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.images import BadImageError, check_image
from data_prep.sources import read_classes
from data_prep.stats import shard_stats
from data_prep.write import permutation, write_shards
from swin_scale.errors import DataError, UserError
from swin_scale.shards import ShardSet
from tests.data_prep.conftest import CLASSES, contents, image_bytes

REPOSITORY = Path(__file__).parents[2]


def stored_images(directory: Path) -> list[tuple[bytes, int]]:
    """(image bytes, label) of every row, through the index."""
    shards = ShardSet.open(directory)
    found = []
    for row in shards.index:
        data = shards.path(row["shard"]).read_bytes()
        found.append((data[row["offset"] : row["offset"] + row["size"]], int(row["label"])))
    return found


def source_images(tree: Path) -> list[tuple[bytes, int]]:
    files = [path for wnid in CLASSES for path in sorted((tree / wnid).iterdir()) if path.suffix != ".txt"]
    return [(path.read_bytes(), CLASSES.index(path.parent.name)) for path in files]


@pytest.mark.parametrize("workers", [2, 4])
def test_bytes_do_not_depend_on_the_number_of_workers(tree, written, tmp_path, workers):
    write_shards(tree, tmp_path / "out", samples_per_shard=12, workers=workers)
    assert contents(tmp_path / "out") == contents(written)


def test_images_are_stored_untouched_in_the_seeded_permutation(tree, written):
    source = source_images(tree)
    assert stored_images(written) == [source[number] for number in permutation(60, 0)]
    manifest = ShardSet.open(written).manifest
    assert manifest.permutation_seed == 0
    assert manifest.classes == manifest.wnids == CLASSES
    assert [shard.samples for shard in manifest.shards] == [12] * 5


def test_labels_are_those_of_torchvision(tree, written):
    from tests.peers import torchvision

    peer = torchvision.datasets.ImageFolder(str(tree))
    assert tuple(peer.classes) == ShardSet.open(written).manifest.classes
    theirs = sorted((Path(path).read_bytes(), label) for path, label in peer.samples)
    assert sorted(stored_images(written)) == theirs


def test_permutation_is_one_and_is_golden():
    for samples in (1, 2, 1000):
        assert sorted(permutation(samples, 7)) == list(range(samples))
    assert not np.array_equal(permutation(1000, 0), permutation(1000, 1))
    # Written sets must stay reproducible with every later NumPy.
    assert permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_stock_webdataset_reads_the_same_bytes_and_labels(written):
    urls = [str(path) for path in sorted(written.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    images = [next(s[e] for e in ("jpg", "png", "webp") if e in s) for s in samples]
    assert list(zip(images, (int(s["cls"]) for s in samples), strict=True)) == stored_images(written)
    assert len({s["__key__"] for s in samples}) == 60
    extensions = {image[:4]: next(e for e in ("jpg", "png", "webp") if e in s) for image, s in zip(images, samples)}
    assert extensions == {b"\xff\xd8\xff\xe0": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


def test_shards_by_bytes_are_even(tree, tmp_path):
    manifest = write_shards(tree, tmp_path / "out", shard_bytes=40_000, workers=1)
    sizes = [shard.bytes for shard in manifest.shards]
    assert manifest.samples == 60 and len(sizes) > 2
    assert max(sizes) - min(sizes) <= 2 * 10240


WRITE = """
import os, sys, time
from pathlib import Path
from data_prep.write import write_shards

def replace(source, target, original=os.replace, most=int(sys.argv[4])):
    while len([*Path(sys.argv[2]).glob("*.tar")]) >= most:
        time.sleep(1)  # for the kill
    original(source, target)

os.replace = replace
if __name__ == "__main__":
    write_shards(sys.argv[1], sys.argv[2], samples_per_shard=2, workers=int(sys.argv[3]))
"""


def write_until(tree: Path, out: Path, workers: int, stop: Callable[[], bool], most: int = 1000) -> None:
    """Start a write in another process and kill -9 it as soon as `stop` says so; of `most` shards it makes no more."""
    script = out.parent / "script.py"
    script.write_text(WRITE)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tree), str(out), str(workers), str(most)],
        env=environment,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not stop() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    wait_for_session_end(process.pid)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_write_goes_on_and_gives_the_same_bytes(tree, tmp_path, workers):
    whole, out = tmp_path / "whole", tmp_path / "out"
    write_shards(tree, whole, samples_per_shard=2, workers=1)
    kept = {}
    for shards in (1, 9):  # killed twice: after the first shard, and later
        # A busy machine may be slow to kill it, and must not find it done.
        write_until(tree, out, workers, lambda shards=shards: len(list(out.glob("*.tar"))) >= shards, most=shards + 9)
        for record in (out / ".records").glob("[0-9]*.npz"):
            path = out / f"shard-{record.stem}.tar"
            kept.setdefault(path, path.stat().st_mtime_ns)
    assert kept and len(kept) < 30 and not (out / "manifest.json").exists()
    (out / ".shard-000029.tar.1.tmp").write_bytes(b"half a shard")
    (out / ".records" / "000029.npz").write_bytes(b"half a record")
    write_shards(tree, out, samples_per_shard=2, workers=1)
    assert contents(out) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.proof
def test_killed_at_twenty_random_moments(tree, tmp_path):
    whole = tmp_path / "whole"
    write_shards(tree, whole, samples_per_shard=2, workers=1)
    for number, delay in enumerate(np.random.default_rng(0).uniform(0.2, 1.2, 20)):
        out = tmp_path / f"out{number}"
        moment = time.monotonic() + delay
        write_until(tree, out, 2, lambda moment=moment: time.monotonic() >= moment)
        write_shards(tree, out, samples_per_shard=2, workers=1)
        assert contents(out) == contents(whole), delay


def wait_for_session_end(leader: int) -> None:
    """Workers of a killed writer must leave by themselves, and soon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(leader, signal.SIGKILL)
    pytest.fail("worker processes outlived their parent by 20 s")


def test_a_shard_that_changed_size_is_written_again(tree, written, tmp_path):
    out = tmp_path / "out"
    write_shards(tree, out, samples_per_shard=12, workers=1)
    for name in ("manifest.json", "index.npy", "left_out.jsonl"):
        (out / name).unlink()
    write_shards(tree, out, samples_per_shard=12, workers=1)
    assert contents(out) == contents(written)


def test_same_call_again_changes_nothing_and_another_is_refused(tree, tmp_path):
    out = tmp_path / "out"
    first = write_shards(tree, out, samples_per_shard=30, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert write_shards(tree, out, samples_per_shard=30, workers=1) == first
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before
    with pytest.raises(UserError, match="seed was 0, is 1"):
        write_shards(tree, out, samples_per_shard=30, seed=1, workers=1)
    with pytest.raises(UserError, match="not empty"):
        write_shards(tree, tmp_path, workers=1)
    with pytest.raises(UserError, match="would become a class"):
        write_shards(tree, tree / "shards", workers=1)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BAD = {
    "zero.jpg": (b"", "empty"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "HTML"),
    "cut.jpg": (image_bytes(1)[:-200], "truncated"),
    "cut.png": (image_bytes(1, "PNG")[:-300], "cannot be decoded"),
    "cut.webp": (image_bytes(1, "WEBP")[:-30], "cannot be decoded"),
    "bomb.png": (png_claiming(65_000, 65_000), "bomb"),
    "large.png": (png_claiming(9_500, 9_500), "bomb"),
    "anim.gif": (b"GIF89a" + bytes(40), "gif"),
    "old.bmp": (image_bytes(1, "BMP"), "bmp"),
    "scan.tiff": (image_bytes(1, "TIFF"), "tiff"),
    "noise.jpg": (bytes(range(200)), "no known image format"),
}


@pytest.mark.fault(17, "corrupt, HTML, empty and other bad images in a source, left out and listed")
def test_unreadable_images_are_listed_and_only_shorten_their_shard(tree, written, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    for name, (data, _) in BAD.items():
        (root / CLASSES[1] / name).write_bytes(data)
    (root / CLASSES[1] / "dangling.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / CLASSES[1] / "pipe.jpg")
    manifests = [
        write_shards(root, tmp_path / f"out{workers}", samples_per_shard=8, workers=workers) for workers in (1, 2)
    ]
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    entries = [json.loads(line) for line in (tmp_path / "out1" / "left_out.jsonl").read_text().splitlines()]
    reasons = {os.path.basename(entry["path"]): entry["reason"] for entry in entries}
    assert reasons.keys() == BAD.keys() | {"dangling.jpg", "pipe.jpg"}
    for name, (_, word) in BAD.items():
        assert word in reasons[name], (name, reasons[name])
    assert reasons["pipe.jpg"] == "not a regular file" and "No such file" in reasons["dangling.jpg"]
    assert manifests[0].left_out == len(reasons) and manifests[0].samples == 60
    assert sorted(stored_images(tmp_path / "out1")) == sorted(stored_images(written))


PEAK_OF_CHECK = r"""
import re, sys
from pathlib import Path
from data_prep.images import BadImageError, check_image

def peak_mib():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

data = sys.stdin.buffer.read()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = peak_mib()
try:
    check_image(data)
except BadImageError as error:
    print(peak_mib() - before, error)
"""


@pytest.mark.fault(20, "65k x 65k PNG, checked under a ceiling on all memory")
@pytest.mark.parametrize("side", [9_500, 65_000])
def test_bombs_are_refused_under_a_memory_ceiling(side):
    result = subprocess.run(
        [sys.executable, "-c", PEAK_OF_CHECK],
        input=png_claiming(side, side),
        capture_output=True,
        cwd=REPOSITORY,
        check=True,
    )
    grown, _, message = result.stdout.decode().partition(" ")
    assert "bomb" in message and float(grown) < 32  # decoded, they are 258 MiB and 12 GiB


def test_mutated_images_raise_nothing_but_bad_image():
    generator = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        original = image_bytes(0, kind)
        for _ in range(150):
            data = bytearray(original)
            for position in generator.integers(0, len(data), 4):
                data[position] = generator.integers(256)
            try:
                check_image(bytes(data[: generator.integers(1, len(data) + 1)]))
            except BadImageError:
                continue


def test_nothing_readable_is_a_data_error_and_may_be_mended(tmp_path):
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    (tmp_path / "tree" / "cat" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="none of 1 images"):
        write_shards(tmp_path / "tree", tmp_path / "out", workers=1)
    (tmp_path / "tree" / "cat" / "a.jpg").write_bytes(image_bytes(0))
    assert write_shards(tmp_path / "tree", tmp_path / "out", workers=1).samples == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_names_the_file_and_keeps_finished_shards(tree, tmp_path, workers):
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on file size fails a write in the middle, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match=r"shard-00000\d\.tar cannot be written.*run the same command again"):
            write_shards(tree, out, samples_per_shard=30, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.glob("*.tar")) and not list(out.glob(".*.tmp"))
    assert write_shards(tree, out, samples_per_shard=30, workers=1).samples == 60


def test_a_second_writer_is_refused(tree, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by another process"):
            write_shards(tree, out, workers=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard is 0"),
        ({"shard_bytes": 1, "samples_per_shard": 1}, "give one of them"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"wnids": ["n00000003"]}, "n00000010"),
    ],
)
def test_bad_arguments(tree, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        write_shards(tree, tmp_path / "out", **arguments)


def test_validation_set_takes_the_labels_of_its_training_set(tree, written, tmp_path):
    shutil.copytree(tree / CLASSES[2], tmp_path / "val" / CLASSES[2])
    classes, wnids = read_classes(written)
    manifest = write_shards(tmp_path / "val", tmp_path / "out", classes=classes, wnids=wnids, workers=1)
    assert manifest.classes == CLASSES
    assert {label for _, label in stored_images(tmp_path / "out")} == {2}


@pytest.mark.parametrize("form", ["integers", "names", "json"])
def test_list_files_give_the_same_set_as_folders(tree, written, tmp_path, form):
    files = [path for wnid in CLASSES for path in sorted((tree / wnid).iterdir()) if path.suffix != ".txt"]
    entries = [(str(path.relative_to(tree)), CLASSES.index(path.parent.name)) for path in files]
    if form == "json":
        text = json.dumps(entries)
    else:
        text = "".join(f"{path}\t{CLASSES[label] if form == 'names' else label}\n" for path, label in entries)
    (tmp_path / "list.txt").write_text(text)
    manifest = write_shards(tree, tmp_path / "out", list_path=tmp_path / "list.txt", samples_per_shard=12, workers=1)
    assert manifest.classes == CLASSES
    ours, theirs = contents(tmp_path / "out"), contents(written)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name.endswith((".tar", ".npy")))


def test_stored_order_mixes_classes_as_a_permutation_does(tmp_path):
    for label in range(20):
        (tmp_path / "tree" / f"{label:02d}").mkdir(parents=True)
        for number in range(40):
            (tmp_path / "tree" / f"{label:02d}" / f"{number}.png").write_bytes(image_bytes(number, "PNG", side=2))
    write_shards(tmp_path / "tree", tmp_path / "out", workers=1)
    stats = shard_stats(tmp_path / "out", headers=50)
    assert stats.permuted_same_label == pytest.approx(39 / 799)
    assert stats.adjacent_same_label <= 2 * stats.permuted_same_label
    assert stats.per_class is not None and stats.per_class.min == stats.per_class.max == 40
    assert stats.width is not None and stats.width.max == 2 and stats.sampled == 50
