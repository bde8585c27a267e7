"""The verb ``shards`` of the command line. Numpy and Pillow are imported by the handlers, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from swin_scale.errors import DataError, UserError

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add ``shards`` with its verbs; each sets ``handler``, a function from the parsed arguments to the exit code."""
    shards = subparsers.add_parser(
        "shards",
        help="write, index, verify, repair and look at shard sets",
        description="Images to WebDataset shards with manifest and index; re-reads, checks and repairs them.",
    )
    verbs = shards.add_subparsers(dest="shards_verb", metavar="VERB", required=True)

    write = verbs.add_parser("write", help="a folder of images to shards", description=_WRITE)
    write.add_argument("source", type=Path, help="folder with one folder per class, or the root of --list")
    write.add_argument("out", type=Path, help="folder of the shard set; run again to go on after a kill")
    write.add_argument("--list", type=Path, metavar="FILE", help="lines PATH<TAB>LABEL, or JSON [[path, label], ...]")
    size = write.add_mutually_exclusive_group()
    size.add_argument("--shard-bytes", type=_bytes, metavar="N", help="bytes of a shard, such as 256M (the default)")
    size.add_argument("--samples-per-shard", type=int, metavar="N")
    write.add_argument("--seed", type=int, default=0, help="of the stored permutation (default 0)")
    _add_classes(write)
    _add_workers(write)
    write.set_defaults(handler=_write)

    index = verbs.add_parser("index", help="manifest and index for tars that are there", description=_INDEX)
    index.add_argument("directory", type=Path)
    _add_classes(index)
    _add_label_key(index)
    _add_workers(index)
    index.set_defaults(handler=_index)

    verify = verbs.add_parser("verify", help="re-read everything, report every fault (exit 3 when there is one)")
    verify.add_argument("directory", type=Path)
    verify.add_argument("--no-decode", action="store_true", help="check digests and structure only")
    _add_label_key(verify)
    _add_workers(verify)
    verify.set_defaults(handler=_verify)

    repair = verbs.add_parser("repair", help="make a damaged set usable; names what is lost", description=_REPAIR)
    repair.add_argument("directory", type=Path)
    repair.add_argument("--dry-run", action="store_true", help="say what would be done and change nothing")
    repair.add_argument("--no-decode", action="store_true", help="trust images that have the right digest")
    _add_classes(repair)
    _add_label_key(repair)
    _add_workers(repair)
    repair.set_defaults(handler=_repair)

    stats = verbs.add_parser("stats", help="counts, sizes and mixing of a shard set")
    stats.add_argument("directory", type=Path)
    stats.add_argument("--headers", type=int, default=2000, metavar="N", help="images to measure (default 2000)")
    stats.set_defaults(handler=_stats)

    sample = verbs.add_parser("sample", help="a few images out of the shards, to look at")
    sample.add_argument("directory", type=Path)
    sample.add_argument("out", type=Path)
    sample.add_argument("-n", type=int, default=16, help="images (default 16)")
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(handler=_sample)
    return shards


_WRITE = """Write a shard set: images untouched, in a seeded permutation, the same bytes for any number of processes.
Images that cannot be decoded are left out and listed in left_out.jsonl."""
_INDEX = "Index a foreign shard set in place: its tars are read, never changed. Labels come from .cls or .json members."

_REPAIR = """Keep every sample that can be vouched for, list the others in lost.jsonl, and index the set anew. A tar
that must be written anew stays beside the new one as NAME.damaged until you remove it. After a kill, run it again."""


def _add_classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="classes in label order: a text file (name, WordNet id, or id and name a line), or another shard set",
    )


def _add_label_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label-key", default="label", metavar="KEY", help="label in .json members (default label)")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the processors at hand)")


def _bytes(text: str) -> int:
    number, suffix = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isdigit() or suffix not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 268435456, 256M or 1G")
    return int(number) * _SUFFIXES[suffix]


def _read_classes(path: Path | None) -> tuple[list[str] | None, list[str] | None]:
    from data_prep.sources import read_classes

    return (None, None) if path is None else read_classes(path)


def _progress(verb: str) -> Callable[[int, int], None] | None:
    """A line that rewrites itself, on a terminal only."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{verb}: {done} of {total} shards", end=end, file=sys.stderr, flush=True)

    return show


def _write(args: argparse.Namespace) -> int:
    from data_prep.write import LEFT_OUT_NAME, write_shards

    classes, wnids = _read_classes(args.classes)
    manifest = write_shards(
        args.source,
        args.out,
        list_path=args.list,
        shard_bytes=args.shard_bytes,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        workers=args.workers,
        classes=classes,
        wnids=wnids,
        progress=_progress("write"),
    )
    print(f"{args.out}: {manifest.samples} samples, {len(manifest.shards)} shards, {len(manifest.classes)} classes")
    if manifest.left_out:
        print(f"left out {manifest.left_out} images, see {args.out / LEFT_OUT_NAME}")
    return 0


def _index(args: argparse.Namespace) -> int:
    from data_prep.index import index_shards

    classes, wnids = _read_classes(args.classes)
    manifest = index_shards(
        args.directory,
        classes=classes,
        wnids=wnids,
        label_key=args.label_key,
        workers=args.workers,
        progress=_progress("index"),
    )
    print(
        f"{args.directory}: {manifest.samples} samples, {len(manifest.shards)} shards, {len(manifest.classes)} classes"
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from data_prep.verify import verify_shards

    report = verify_shards(
        args.directory,
        decode=not args.no_decode,
        label_key=args.label_key,
        workers=args.workers,
        progress=_progress("verify"),
    )
    for problem in report.problems:
        print(problem)
    found = f"{len(report.problems)} problems" if report.problems else "clean"
    print(f"{args.directory}: {report.samples} samples in {report.shards} shards, {report.bytes} bytes read: {found}")
    return 0 if report.clean else DataError.exit_code


def _repair(args: argparse.Namespace) -> int:
    from data_prep.repair import LOST_NAME, repair_shards

    classes, wnids = _read_classes(args.classes)
    report = repair_shards(
        args.directory,
        classes=classes,
        wnids=wnids,
        label_key=args.label_key,
        decode=not args.no_decode,
        dry_run=args.dry_run,
        workers=args.workers,
        progress=_progress("repair"),
    )
    for note in report.lost:
        print(f"lost: {note}")
    for note in report.mended:
        print(f"{'damage' if note.key is None else 'mended'}: {note}")
    would = "would have" if args.dry_run else "has"
    mended = sum(note.key is not None for note in report.mended)
    print(
        f"{args.directory} {would} {report.samples} samples, {len(report.lost)} lost, {mended} mended, "
        f"{len(report.rewritten)} tars written anew"
    )
    if report.lost and not args.dry_run:
        print(f"all that is lost is named in {args.directory / LOST_NAME}")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from data_prep.stats import Spread, shard_stats

    if args.headers < 0:
        raise UserError(f"--headers is {args.headers}; give 0 or more")
    stats = shard_stats(args.directory, headers=args.headers)

    def line(name: str, value: object) -> None:
        if isinstance(value, Spread):
            value = f"{value.min:g} min, {value.median:g} median, {value.max:g} max"
        print(f"{name:<24}{value}")

    line("shards", stats.shards)
    line("samples", stats.samples)
    line("bytes", stats.bytes)
    line("left out when written", stats.left_out)
    line("bytes per image", stats.image_bytes)
    line("classes", stats.classes)
    line("samples per class", stats.per_class)
    missing = stats.missing_classes
    line("classes without images", ", ".join([str(len(missing)), *missing[:5]]) + (", ..." if len(missing) > 5 else ""))
    line("samples without label", stats.unlabelled)
    line(f"width ({stats.sampled} read)", stats.width)
    line("height", stats.height)
    line("megapixels", stats.megapixels)
    line("neighbours of one class", f"{stats.adjacent_same_label:.6f}, permuted {stats.permuted_same_label:.6f}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    from data_prep.sample import sample

    for path in sample(args.directory, args.n, args.out, seed=args.seed):
        print(path)
    return 0
