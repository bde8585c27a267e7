"""The command line: parse, import late, print, and turn errors into exit codes.

Exit codes: 0 done; 2 wrong input; 3 data; 4 checkpoint; 5 diverged; 6 a peer was lost; 75 preempted and saved.
Results are printed in the `cli.py` files alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from swin_scale.errors import SwinScaleError, UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.handler(arguments) or 0)
    except SwinScaleError as error:
        print(f"swin-scale: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("swin-scale: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


def build_parser() -> argparse.ArgumentParser:
    """All verbs; importing nothing heavier than argparse, so that --help answers at once."""
    from data_prep.cli import add_parser as add_shards
    from swin_scale.bench.cli import add_parser as add_bench

    parser = argparse.ArgumentParser(prog="swin-scale", description="Pretrain Swin Transformers at scale.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_shards(verbs)

    train = verbs.add_parser("train", help="one run; the same command resumes it")
    _config_arguments(train)
    train.add_argument("--allow-change", action="store_true", help="resume although keys changed that alter training")
    train.set_defaults(handler=_train)

    launch = verbs.add_parser("launch", help="start `train` on several processes")
    where = launch.add_subparsers(dest="where", required=True)
    local = where.add_parser("local", help="on this machine")
    local.add_argument("--nproc", type=int, required=True, help="processes to start, one per GPU where there are GPUs")
    _config_arguments(local)
    local.add_argument("--allow-change", action="store_true", help="passed on to `train`")
    local.set_defaults(handler=_launch_local)

    evaluate = verbs.add_parser(
        "eval", help="top-1 and top-5 over shards, of a model or of a classifier on its features"
    )
    _weights_arguments(evaluate)
    evaluate.add_argument("--data", nargs="+", required=True, metavar="DIR", help="shard directories")
    evaluate.add_argument("--img-size", type=int, help="input size in pixels; default: the model's")
    evaluate.add_argument("--squash", action="store_true", help="resize to the square instead of cropping the centre")
    evaluate.add_argument("--batch", type=int, default=64)
    evaluate.add_argument("--workers", type=int, default=2)
    evaluate.add_argument("--probe", choices=("knn", "linear", "few-shot"), help="a classifier on frozen features")
    evaluate.add_argument("--train", nargs="+", metavar="DIR", help="shard directories that the classifier learns from")
    evaluate.add_argument("--shots", type=int, default=5, help="images of each class for few-shot")
    evaluate.set_defaults(handler=_evaluate)

    predict = verbs.add_parser("predict", help="labels for image files, with names")
    _weights_arguments(predict)
    predict.add_argument("images", nargs="+", help="image files or folders")
    predict.add_argument("--img-size", type=int, help="input size in pixels; default: the model's")
    predict.add_argument("--topk", type=int, default=5)
    predict.add_argument("--json", action="store_true", help="one JSON object per image")
    predict.set_defaults(handler=_predict)

    convert = verbs.add_parser("convert", help="any known checkpoint to one weight file, with a receipt")
    convert.add_argument(
        "source",
        help="run, checkpoint, DeepSpeed ZeRO, Hugging Face or Swin-MoE directory, Swin-MoE zip, or weight file",
    )
    convert.add_argument("destination", help="file to write (for hf a directory, for experts' ranks one or a .zip)")
    # Not argparse's choices: the table of formats needs torch, and `convert` checks the name.
    formats = "safetensors, official, timm, hf, torchvision, mm, tutel-epN"
    convert.add_argument("--to", required=True, metavar="FORMAT", help=f"format to write: {formats}")
    convert.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    convert.add_argument("--model", metavar="NAME", help="the model, where the source does not tell")
    convert.set_defaults(handler=_convert)

    report = verbs.add_parser("report", help="a run as one page of pictures and tables")
    report.add_argument("run", help="run directory")
    report.add_argument("--out", metavar="FILE", help="default: report.html in the run directory")
    report.set_defaults(handler=_report)

    inspect = verbs.add_parser("inspect", help="what is in a checkpoint, a weight file, a shard set, a config")
    inspect.add_argument("path")
    inspect.add_argument("--routing", action="store_true", help="of a model with experts: a page of what goes where")
    inspect.add_argument("--data", nargs="+", metavar="SHARDS", help="with --routing: the images to send through it")
    inspect.add_argument("--images", type=int, default=10_000, help="with --routing: at most so many")
    inspect.add_argument("--out", metavar="FILE", help="with --routing: the page; default: routing.html")
    inspect.add_argument("--model", metavar="NAME", help="with --routing: the model, where the file does not tell")
    inspect.add_argument("--ema", action="store_true", help="with --routing: take the moving average of the weights")
    inspect.set_defaults(overrides=[])
    inspect.set_defaults(handler=_inspect)

    configs = verbs.add_parser("configs", help="the shipped recipes")
    which = configs.add_subparsers(dest="which", required=True)
    which.add_parser("list", help="every recipe with its first line").set_defaults(handler=_configs_list)
    show = which.add_parser("show", help="one recipe, resolved, with where each value came from")
    _config_arguments(show)
    show.set_defaults(handler=_configs_show)

    add_bench(verbs)
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values to set over the file's")


def _weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="run directory, checkpoint directory, .pth or .safetensors")
    parser.add_argument("--model", help="model name; needed for weight files that do not name theirs")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")


def _find_config(name: str) -> Path:
    """A path as given, or a shipped recipe by its stem or its path below ``configs/``."""
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    import difflib

    stems = [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in sorted(CONFIGS.rglob("*.yaml"))]
    near = difflib.get_close_matches(name, stems, n=2)
    raise UserError(
        f"config {name!r} is neither a file nor a shipped recipe"
        + (f"; did you mean {' or '.join(near)}?" if near else "; `swin-scale configs list` names them")
    )


def _load(arguments: argparse.Namespace):
    from swin_scale.config_load import load_config

    name = arguments.path if arguments.verb == "inspect" else arguments.config
    return load_config(_find_config(name), arguments.overrides)


def _train(arguments: argparse.Namespace) -> int:
    loaded = _load(arguments)
    from swin_scale.train import run

    return run(loaded, allow_change=arguments.allow_change)


def _launch_local(arguments: argparse.Namespace) -> int:
    from launcher.local import launch_local
    from swin_scale.config import batch_plan

    batch_plan(_load(arguments).config, arguments.nproc)
    command = ["train", str(_find_config(arguments.config)), *arguments.overrides]
    return launch_local(arguments.nproc, command + ["--allow-change"] * arguments.allow_change)


def _evaluate(arguments: argparse.Namespace) -> int:
    import json

    from swin_scale.errors import UserError

    if arguments.probe and not arguments.train:
        raise UserError(f"--probe {arguments.probe} needs --train, the shards that the classifier learns from")
    options = {
        "model": arguments.model,
        "kind": "ema" if arguments.ema else "master",
        "img_size": arguments.img_size,
        "crop": not arguments.squash,
        "batch": arguments.batch,
        "workers": arguments.workers,
    }
    if arguments.probe:
        from swin_scale.probe import probe

        what = {"method": arguments.probe, "shots": arguments.shots}
        figures = probe(arguments.weights, arguments.train, arguments.data, **what, **options)
    else:
        from swin_scale.evaluate import evaluate_weights

        figures = evaluate_weights(arguments.weights, arguments.data, **options)
    print(json.dumps(figures))
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    import json

    from swin_scale.predictor import image_files, load_predictor

    predictor = load_predictor(
        arguments.weights,
        model=arguments.model,
        kind="ema" if arguments.ema else "master",
        img_size=arguments.img_size,
    )
    for path in image_files(arguments.images):
        guesses = predictor(path, topk=arguments.topk)
        if arguments.json:
            print(json.dumps({"image": str(path), "predictions": [guess.as_dict() for guess in guesses]}))
        else:
            print(path)
            for guess in guesses:
                print(f"  {guess.probability:7.2%}  {guess.label:>6}  {guess.name}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from swin_scale.convert import convert

    kind = "ema" if arguments.ema else "master"
    print(convert(arguments.source, arguments.destination, to=arguments.to, kind=kind, model=arguments.model))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from swin_scale.report import write_report

    try:
        print(write_report(arguments.run, arguments.out))
    except OSError as error:
        raise UserError(f"the report of {arguments.run} cannot be written: {error}; use --out") from error
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.routing:
        return _inspect_routing(arguments)
    if arguments.data:
        raise UserError("--data is for --routing; add it, or leave --data out")
    if arguments.path.endswith((".yaml", ".yml")):
        return _configs_show(arguments)
    from swin_scale.convert import inspect_path

    print(inspect_path(arguments.path))
    return 0


def _inspect_routing(arguments: argparse.Namespace) -> int:
    if not arguments.data:
        raise UserError("--routing needs images; add --data SHARDS, one or more shard directories")
    from swin_scale.routing import inspect_routing

    kind = "ema" if arguments.ema else "master"
    page = inspect_routing(
        arguments.path, arguments.data, out=arguments.out, model=arguments.model, kind=kind, images=arguments.images
    )
    print(page)
    return 0


def _configs_list(arguments: argparse.Namespace) -> int:
    recipes = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))}
    for name, path in recipes.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        print(f"{name:<{max(map(len, recipes))}} {first}")
    return 0


def _configs_show(arguments: argparse.Namespace) -> int:
    print(_load(arguments).dump(), end="")
    return 0
