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
from swin_scale.recipes import CONFIGS, catalogue, recipes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = _parse(argv)
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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``a.b=c`` may stand behind options too, where argparse itself no longer takes them."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any("=" not in word or word[0] == "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """All verbs; importing nothing heavier than argparse, so that --help answers at once."""
    from data_prep.cli import add_parser as add_shards
    from launcher.cli import add_run_verbs, add_slurm_arguments
    from swin_scale.bench.cli import add_parser as add_bench
    from swin_scale.doctor.cli import add_parser as add_doctor
    from swin_scale.plan.cli import add_parser as add_plan

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
    slurm = where.add_parser("slurm", help="on a cluster: writes the batch script and submits it")
    _config_arguments(slurm)
    add_slurm_arguments(slurm)
    slurm.set_defaults(handler=_launch_slurm)
    add_run_verbs(verbs)

    evaluate = verbs.add_parser(
        "eval", help="top-1 and top-5 over shards, of a model or of a classifier on its features"
    )
    _weights_arguments(evaluate)
    evaluate.add_argument("--data", nargs="+", required=True, metavar="DIR", help="shard directories")
    evaluate.add_argument("--batch", type=int, default=64)
    evaluate.add_argument("--workers", type=int, default=2)
    evaluate.add_argument("--probe", choices=("knn", "linear", "few-shot"), help="a classifier on frozen features")
    evaluate.add_argument("--train", nargs="+", metavar="DIR", help="shard directories that the classifier learns from")
    evaluate.add_argument("--shots", type=int, help="images of each class for few-shot; default: 5")
    evaluate.set_defaults(handler=_evaluate)

    predict = verbs.add_parser("predict", help="labels for image files, with names")
    _weights_arguments(predict)
    predict.add_argument("images", nargs="+", help="image files or folders")
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
    inspect.add_argument("--verify", action="store_true", help="read checkpoints whole and compare their digests")
    inspect.add_argument("--routing", action="store_true", help="of a model with experts: a page of what goes where")
    inspect.add_argument("--data", nargs="+", metavar="SHARDS", help="with --routing: the images to send through it")
    inspect.add_argument("--images", type=int, help="with --routing: at most so many; default: 10000")
    inspect.add_argument("--out", metavar="FILE", help="with --routing: the page; default: routing.html")
    inspect.add_argument("--model", metavar="NAME", help="with --routing: the model, where the file does not tell")
    inspect.add_argument("--ema", action="store_true", help="with --routing: take the moving average of the weights")
    inspect.set_defaults(overrides=[])
    inspect.set_defaults(handler=_inspect)

    configs = verbs.add_parser("configs", help="the shipped recipes")
    which = configs.add_subparsers(dest="which", required=True)
    which.add_parser("list", help="every recipe, in groups, with what it is").set_defaults(handler=_configs_list)
    show = which.add_parser("show", help="one recipe, resolved, with where each value came from")
    _config_arguments(show)
    show.set_defaults(handler=_configs_show)

    add_plan(verbs, _config_arguments, _load)
    add_doctor(verbs, _load, _find_config)
    add_bench(verbs)
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values to set over the file's")


def _weights_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="run directory, checkpoint directory, .pth or .safetensors")
    parser.add_argument("--model", help="model name; needed for weight files that do not name theirs")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    parser.add_argument("--img-size", type=int, help="input size in pixels; default: the model's")
    parser.add_argument(
        "--squash",
        action=argparse.BooleanOptionalAction,
        help="resize to the square, or crop the centre; default: as the run of the weights did, else crop",
    )


def _only_with(arguments: argparse.Namespace, options: Sequence[str], needed: str) -> None:
    """Raise UserError for the first of `options` that was given, as it does nothing without `needed`."""
    for option in options:
        given = getattr(arguments, option)
        if given is not None and given is not False:
            raise UserError(f"--{option} is for {needed}; add it, or leave --{option} out")


def _find_config(name: str) -> Path:
    """A path as given, or a shipped recipe by its path below ``configs/`` or by its stem."""
    shipped = recipes()
    named = [path for stem, path in shipped.items() if stem.rpartition("/")[2] == name]
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml", *named[:1]):
        if path.is_file():
            return path
    import difflib

    near = difflib.get_close_matches(name, shipped, n=2)
    raise UserError(
        f"config {name!r} is neither a file nor a shipped recipe"
        + (f"; did you mean {' or '.join(near)}?" if near else "; `swin-scale configs list` names them")
    )


def _load(arguments: argparse.Namespace):
    from swin_scale.staged import load

    name = arguments.path if arguments.verb == "inspect" else arguments.config
    return load(_find_config(name), arguments.overrides)


def _train(arguments: argparse.Namespace) -> int:
    from swin_scale.end_signals import EndSignals
    from swin_scale.sections import process_began

    with EndSignals() as signals:  # before whatever takes time, imports above all
        from swin_scale.staged import Staged

        began, loaded = process_began(), _load(arguments)
        if isinstance(loaded, Staged):
            from swin_scale.staged_run import run_stages

            return run_stages(loaded, allow_change=arguments.allow_change, began=began, signals=signals)
        from swin_scale.train import run

        return run(loaded, allow_change=arguments.allow_change, began=began, signals=signals)


def _launch_local(arguments: argparse.Namespace) -> int:
    from launcher.local import launch_local
    from swin_scale.config import batch_plan

    for config in _load(arguments).configs:
        batch_plan(config, arguments.nproc)
    command = ["train", str(_find_config(arguments.config)), *arguments.overrides]
    return launch_local(arguments.nproc, command + ["--allow-change"] * arguments.allow_change, listens=True)


def _launch_slurm(arguments: argparse.Namespace) -> int:
    from launcher.cli import launch_slurm
    from swin_scale.plan.cli import forecast

    return launch_slurm(arguments, _load(arguments), forecast)


def _evaluate(arguments: argparse.Namespace) -> int:
    import json

    if not arguments.probe:
        _only_with(arguments, ("train", "shots"), "--probe")
    elif arguments.probe != "few-shot":
        _only_with(arguments, ("shots",), "--probe few-shot")
    if arguments.probe and not arguments.train:
        raise UserError(f"--probe {arguments.probe} needs --train, the shards that the classifier learns from")
    options = {
        "model": arguments.model,
        "kind": "ema" if arguments.ema else "master",
        "img_size": arguments.img_size,
        "crop": _crop(arguments),
        "batch": arguments.batch,
        "workers": arguments.workers,
    }
    if arguments.probe:
        from swin_scale.probe import probe

        what = {"method": arguments.probe, "shots": 5 if arguments.shots is None else arguments.shots}
        figures = probe(arguments.weights, arguments.train, arguments.data, **what, **options)
    else:
        from swin_scale.evaluate import evaluate_weights

        figures = evaluate_weights(arguments.weights, arguments.data, **options)
    print(json.dumps(figures))
    return 0


def _crop(arguments: argparse.Namespace) -> bool | None:
    return None if arguments.squash is None else not arguments.squash


def _predict(arguments: argparse.Namespace) -> int:
    import json

    from swin_scale.predictor import image_files, load_predictor

    predictor = load_predictor(
        arguments.weights,
        model=arguments.model,
        kind="ema" if arguments.ema else "master",
        img_size=arguments.img_size,
        crop=_crop(arguments),
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
        if arguments.verify:
            raise UserError("--verify does not go with --routing; inspect twice, once with each")
        return _inspect_routing(arguments)
    _only_with(arguments, ("data", "images", "out", "model", "ema"), "--routing")
    if arguments.path.endswith((".yaml", ".yml")):
        if arguments.verify:
            raise UserError(f"{arguments.path} is a config, and has no digests to verify; leave --verify out")
        return _configs_show(arguments)
    from swin_scale.convert import inspect_path

    print(inspect_path(arguments.path, verify=arguments.verify))
    return 0


def _inspect_routing(arguments: argparse.Namespace) -> int:
    if not arguments.data:
        raise UserError("--routing needs images; add --data SHARDS, one or more shard directories")
    from swin_scale.routing import inspect_routing

    kind = "ema" if arguments.ema else "master"
    images = 10_000 if arguments.images is None else arguments.images
    page = inspect_routing(
        arguments.path, arguments.data, out=arguments.out, model=arguments.model, kind=kind, images=images
    )
    print(page)
    return 0


def _configs_list(arguments: argparse.Namespace) -> int:
    print(catalogue())
    return 0


def _configs_show(arguments: argparse.Namespace) -> int:
    print(_load(arguments).dump(), end="")
    return 0
