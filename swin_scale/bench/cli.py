"""The command line of the benchmarks, ``swin-scale bench NAME``."""

from __future__ import annotations

import argparse
from typing import Any

from swin_scale.bench import KERNEL_PEERS, MOE_PEERS, PEERS


def add_parser(verbs: Any) -> None:
    """Add ``bench`` to the verbs; what a benchmark needs is imported when it runs."""
    bench = verbs.add_parser("bench", help="side-by-side ratios against the peers, in one run")
    what = bench.add_subparsers(dest="name", required=True)
    model = what.add_parser("model", help="SwinV2 against the official code, timm and Hugging Face")
    _arguments(model, name="swinv2_tiny_patch4_window8_256", batch=None)
    model.add_argument(
        "--precision",
        default="fp32",
        help="fp32, bf16, fp16, amp-bf16 or amp-fp16, for all alike but the peer official-amp, which is under AMP",
    )
    model.add_argument("--rounds", type=int, default=20, help="ABBA rounds; each gives two pairs")
    model.add_argument("--official", metavar="DIR", help="a checkout of microsoft/Swin-Transformer to compare with")
    model.add_argument("--peers", nargs="+", choices=PEERS, default=(), help="default: all that make sense there")
    model.add_argument("--mode", choices=("forward", "both", "step", "all"), default="both",
                       help="both: forward, and forward + backward; step: with AdamW too")  # fmt: skip
    model.add_argument("--inference", action="store_true",
                       help="the official throughput protocol: 50 forward passes, then the mean of 30")  # fmt: skip
    model.add_argument("--compile", action="store_true", help="also compare with torch.compile(timm)")
    model.add_argument("--launches", nargs="+", choices=("calls", "graphs"), default=("calls",),
                       help="graphs: as CUDA graphs, without the cost of launching kernels")  # fmt: skip
    model.set_defaults(handler=_model)
    kernels = what.add_parser("kernels", help="window attention, norms and token moves against how others do them")
    kernels.add_argument("--shapes", nargs="+", metavar="SHAPE", default=(),
                         help="of the table, such as 'T w8 s1'; default: all, the most telling first")  # fmt: skip
    kernels.add_argument("--models", nargs="+", metavar="NAME", default=(), help="every stage of these models instead")
    kernels.add_argument("--batch", type=int, help="images; default: 128 on a GPU, 2 on a CPU")
    kernels.add_argument("--dtypes", nargs="+", choices=("fp16", "bf16", "fp32"), default=(),
                         help="default: fp16 and bf16 on a GPU, fp32 on a CPU")  # fmt: skip
    kernels.add_argument("--peers", nargs="+", choices=KERNEL_PEERS, default=(),
                         help="default: all that make sense there but autotuned, which takes minutes")  # fmt: skip
    kernels.add_argument("--launches", nargs="+", choices=("calls", "graphs"), default=(),
                         help="from Python, or as CUDA graphs; default: both on a GPU")  # fmt: skip
    kernels.add_argument("--rounds", type=int, default=20, help="ABBA rounds; each gives two pairs")
    kernels.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further shape after this time")
    kernels.add_argument("--parts", nargs="+", choices=("attention", "ops"), default=(),
                         help="ops: norms, patch merging and MoE token moves; default: both on a GPU")  # fmt: skip
    kernels.add_argument("--shifts", nargs="+", choices=("shifted", "unshifted"), default=("shifted", "unshifted"))
    kernels.add_argument("--official", metavar="DIR", help="a checkout of microsoft/Swin-Transformer")
    kernels.add_argument("--fwa", metavar="DIR", help="a checkout of emiledgl/flash-window-attention-v2")
    kernels.add_argument("--threads", type=int, default=2, help="CPU threads")
    kernels.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    kernels.add_argument("--out", metavar="FILE", help="write the result as JSON, and a picture of it beside as SVG")
    kernels.set_defaults(handler=_kernels)
    tune = what.add_parser("tune", help="a table of tiles for window attention, measured on this GPU")
    tune.add_argument("--shapes", nargs="+", metavar="SHAPE", default=(), help="as of bench kernels; default: all")
    tune.add_argument("--batch", type=int, default=128, help="images; default: 128")
    tune.add_argument("--dtypes", nargs="+", choices=("fp16", "bf16", "fp32"), default=("fp16", "bf16"))
    tune.add_argument("--rounds", type=int, default=20, help="ABBA rounds; each gives two pairs")
    tune.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further kernel after this time")
    tune.add_argument("--out", metavar="FILE", required=True, help="the table; SWIN_SCALE_TILES=FILE uses it")
    tune.set_defaults(handler=_tune)
    train = what.add_parser("train", help="the engine's step on one process, on a batch that stays on the device")
    _arguments(train, name="swinv2_base_patch4_window12_192", batch=64)
    train.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    train.add_argument("--steps", type=int, default=20, help="timed steps, after --warmup untimed ones")
    train.add_argument("--warmup", type=int, default=5)
    train.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1)
    train.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    train.add_argument("--activation-checkpointing", choices=("off", "block", "selective"), default="off")
    train.set_defaults(handler=_train)
    simmim = what.add_parser("simmim", help="a SimMIM step against the supervised step of the same encoder")
    _arguments(simmim, name="swinv2_base_patch4_window12_192", batch=4)
    simmim.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    simmim.add_argument("--rounds", type=int, default=20, help="ABBA rounds; each gives two pairs")
    simmim.add_argument("--mask-patch-size", type=int, default=32, help="pixels of a cell that is hidden or seen")
    simmim.add_argument("--norm-target", type=int, help="pixels of the neighbourhood that targets are standardised by")
    simmim.set_defaults(handler=_simmim)
    data = what.add_parser("data", help="JPEG to training crop against Pillow: images per CPU-second")
    data.add_argument(
        "--images", metavar="DIR", help="photographs; default: those of the package foolbox, if installed"
    )
    data.add_argument("--img-size", type=int, default=224, help="of the crops")
    data.add_argument("--rounds", type=int, default=20, help="ABBA rounds; each gives two pairs")
    data.add_argument("--out", metavar="FILE", help="write the result as JSON")
    data.set_defaults(handler=_data)
    checkpoint = what.add_parser("checkpoint", help="save, load and convert against torch, safetensors and DeepSpeed")
    checkpoint.add_argument("--part", nargs="+", choices=("save", "convert", "async"), default=["save", "convert"],
                            help="save: and load; async: the stall and the writing of a save in the background; "
                            "default: save and convert")  # fmt: skip
    checkpoint.add_argument("--params", type=float, default=300e6, help="parameters of the model")
    checkpoint.add_argument("--rounds", type=int, default=5, help="ABBA rounds; each gives two pairs")
    checkpoint.add_argument("--ranks", type=int, default=2, help="processes that write the ZeRO checkpoint")
    checkpoint.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=2)
    checkpoint.add_argument("--threads", type=int, default=2, help="CPU threads")
    checkpoint.add_argument("--dir", help="where files are written and removed; default: the system's temporary place")
    checkpoint.add_argument("--out", metavar="FILE", help="write the result as JSON")
    checkpoint.set_defaults(handler=_checkpoint)
    moe = what.add_parser("moe", help="an MoE layer against a dense MLP, Tutel, DeepSpeed and one-hot einsum")
    moe.add_argument("--dim", type=int, default=384, help="channels; experts have four times as many hidden units")
    moe.add_argument("--tokens", type=int, default=4096, help="of the comparisons with 8 experts")
    moe.add_argument("--many-tokens", type=int, default=16384, help="of the comparison with 64 experts")
    moe.add_argument("--memory-tokens", type=int, default=32768, help="of the comparison of memory; 0: none")
    moe.add_argument("--rounds", type=int, default=20, help="ABBA rounds; each gives two pairs")
    moe.add_argument("--threads", type=int, default=2, help="CPU threads")
    moe.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="for all alike")
    moe.add_argument("--peers", nargs="+", choices=MOE_PEERS, default=MOE_PEERS, help="default: all of them")
    moe.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    moe.add_argument("--out", metavar="FILE", help="write the result as JSON")
    moe.set_defaults(handler=_moe)


def _arguments(parser: argparse.ArgumentParser, *, name: str, batch: int | None) -> None:
    parser.add_argument("--model", default=name, help=f"default: {name}")
    chosen = "default: 8, or 32 for inference" if batch is None else f"default: {batch}"
    parser.add_argument("--batch", type=int, default=batch, help=f"images per forward; {chosen}")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")


def _model(arguments: argparse.Namespace) -> int:
    from swin_scale.bench.model import bench_model

    print(
        bench_model(
            arguments.model,
            batch=arguments.batch,
            rounds=arguments.rounds,
            threads=arguments.threads,
            official=arguments.official,
            only=tuple(arguments.peers),
            mode=arguments.mode,
            inference=arguments.inference,
            precision=arguments.precision,
            compiled=arguments.compile,
            launches=tuple(arguments.launches),
            device=arguments.device,
            out=arguments.out,
        )
    )
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from swin_scale.bench.kernels import bench_kernels

    print(
        bench_kernels(
            arguments.shapes,
            models=arguments.models,
            batch=arguments.batch,
            dtypes=arguments.dtypes,
            only=arguments.peers,
            launches=arguments.launches,
            rounds=arguments.rounds,
            budget=arguments.budget,
            shifts=arguments.shifts,
            parts=arguments.parts,
            official=arguments.official,
            fwa=arguments.fwa,
            threads=arguments.threads,
            device=arguments.device,
            out=arguments.out,
        )
    )
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from swin_scale.bench.tune import bench_tune

    print(
        bench_tune(
            arguments.shapes,
            batch=arguments.batch,
            dtypes=arguments.dtypes,
            rounds=arguments.rounds,
            budget=arguments.budget,
            out=arguments.out,
        )
    )
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from swin_scale.bench.train import bench_train

    print(
        bench_train(
            arguments.model,
            precision=arguments.precision,
            batch=arguments.batch,
            steps=arguments.steps,
            warmup=arguments.warmup,
            zero_stage=arguments.zero_stage,
            accumulation=arguments.accumulation,
            activation_checkpointing=arguments.activation_checkpointing,
            threads=arguments.threads,
            device=arguments.device,
            out=arguments.out,
        )
    )
    return 0


def _simmim(arguments: argparse.Namespace) -> int:
    from swin_scale.bench.simmim import bench_simmim

    print(
        bench_simmim(
            arguments.model,
            batch=arguments.batch,
            rounds=arguments.rounds,
            threads=arguments.threads,
            precision=arguments.precision,
            mask_patch_size=arguments.mask_patch_size,
            norm_target=arguments.norm_target,
            device=arguments.device,
            out=arguments.out,
        )
    )
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from swin_scale.bench.data import bench_data

    print(bench_data(arguments.images, img_size=arguments.img_size, rounds=arguments.rounds, out=arguments.out))
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    from swin_scale.bench.checkpoint import bench_checkpoint

    print(
        bench_checkpoint(
            params=arguments.params,
            parts=arguments.part,
            rounds=arguments.rounds,
            ranks=arguments.ranks,
            zero_stage=arguments.zero_stage,
            threads=arguments.threads,
            directory=arguments.dir,
            out=arguments.out,
        )
    )
    return 0


def _moe(arguments: argparse.Namespace) -> int:
    from swin_scale.bench.moe import bench_moe

    print(
        bench_moe(
            dim=arguments.dim,
            tokens=arguments.tokens,
            many_tokens=arguments.many_tokens,
            memory_tokens=arguments.memory_tokens,
            rounds=arguments.rounds,
            threads=arguments.threads,
            precision=arguments.precision,
            only=tuple(arguments.peers),
            device=arguments.device,
            out=arguments.out,
        )
    )
    return 0
