"""The configuration tree: every key a run can set, with its unit, its default and what makes it invalid.

`config_load.py` fills it from YAML and ``a.b=c`` overrides, `config_check.py` judges the values. Batch arithmetic is
written once, in `batch_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from swin_scale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Run:
    dir: str
    """Run directory: everything a run writes lives below it; the same directory resumes the run."""
    seed: int = 0
    """Keys sample order, augmentation, initial weights and drop-path."""


@dataclass(frozen=True, kw_only=True)
class Data:
    train: tuple[str, ...]
    """Shard directories; several are mixed by `weights`."""
    val: tuple[str, ...] = ()
    """Shard directories to evaluate on, in stored order; empty means no evaluation."""
    weights: tuple[float, ...] = ()
    """Passes over each training source per epoch; empty means one each."""
    img_size: int | tuple[int, int] | None = None
    """Input size in pixels, one number or [H, W]; unset follows the model's name."""
    workers: int = 4
    """Loader processes per rank; 0 decodes in the training process."""
    prefetch: int = 2
    """Batches prepared ahead, over all workers of a rank."""
    drop_last: bool = False
    """Drop the remainder of an epoch (the official recipes) instead of filling the last batch with empty slots."""
    block: int = 16
    """Consecutive stored samples that are read together; part of the sample order."""
    max_bad_rate: float = 0.01
    """Fraction of unusable samples past which the run stops with exit code 3."""
    exclude: tuple[int, ...] = ()
    """Sample ids to leave out, as ``skipped.jsonl`` and the loss guard name them: their slots stay empty, no other
    sample moves, and they do not count as unusable."""
    max_pixels: int = 100_000_000
    """Images that declare more pixels are unusable; checked before decoding."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Official training transform; `crop_scale: [1, 1]`, zeros and `none` switch every part off."""

    crop: Literal["resized", "pad"] | None = None
    """`resized`: RandomResizedCrop; `pad`: zero-pad by 4 and crop. Unset: `pad` up to 32 pixels, as officially."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    hflip: float = 0.5
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment recipe in timm's notation, or `none`."""
    color_jitter: float = 0.4
    """Used only when auto_augment is `none`, as officially."""
    reprob: float = 0.25
    remode: Literal["pixel", "const"] = "pixel"
    recount: int = 1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    eval_crop: bool = True
    """Resize to 256/224 of the size and centre-crop; false squashes to the size (all official 384 px recipes)."""

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, which makes targets soft and needs even micro-batches."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A named variant and what to change in it; unset values follow the name (and, for classes, the data)."""

    name: str
    num_classes: int | None = None
    window_size: int | tuple[int, int] | None = None
    """Tokens, one number or [height, width]; each is clamped to the map."""
    pretrained_window_sizes: tuple[int, ...] | None = None
    drop_path_rate: float | None = None
    drop_rate: float | None = None
    attn_drop_rate: float | None = None
    embed_dim: int | None = None
    depths: tuple[int, ...] | None = None
    num_heads: tuple[int, ...] | None = None
    mlp_ratio: float | None = None
    in_chans: int | None = None
    qkv_bias: bool | None = None
    ape: bool | None = None
    patch_norm: bool | None = None
    extra_norm_interval: int | None = None
    mlp_fc2_bias: bool | None = None


@dataclass(frozen=True, kw_only=True)
class MoE:
    """The experts of a mixture-of-experts model (`moe/config.py` says more); unset values follow the model's name."""

    experts: int | None = None
    """Experts of each layer, over all ranks."""
    top_k: int | None = None
    """Experts each token goes to."""
    router: Literal["linear", "cosine"] | None = None
    capacity_factor: float | None = None
    """Room of an expert in training, in shares of an even load; 0 is dropless."""
    eval_capacity_factor: float | None = None
    """The same in evaluation."""
    gate_noise: float | None = None
    """Standard deviation, times experts, of the noise on the gate's logits in training."""
    batch_prioritized: bool | None = None
    """Where room is short, the tokens with the highest gate score go first."""
    normalize_gate: bool | None = None
    """With top_k > 1, divide a token's gate values by their sum."""
    balance: Literal["load_importance", "gshard"] | None = None
    aux_weight: float | None = None
    """Weight of the balance loss."""
    z_weight: float | None = None
    """Weight of the z-loss."""
    aux_scope: Literal["global", "rank"] = "global"
    """Tokens over which these losses are taken: those of all ranks' micro-batches, or each rank's own, as in Tutel."""
    cosine_dim: int | None = None
    cosine_init_t: float | None = None
    drop: float | None = None
    """Dropout rate inside of experts."""
    fc2_bias: bool | None = None
    """Experts have a second bias; with model.mlp_fc2_bias, what upcycling an MLP that has one needs."""
    a2a_chunks: int | None = None
    """Pieces in which tokens travel between ranks, so that experts compute meanwhile."""
    ep_size: int = 1
    """Ranks that share one set of experts; divides experts and ranks. Needs engine.zero_stage 1 or 2 above 1."""
    backend: Literal["native", "tutel"] = "native"


@dataclass(frozen=True, kw_only=True)
class SimMIM:
    """Masked-image pre-training (Xie et al., 2022); only with task simmim, which also changes other defaults, see
    `config_load.TASK_DEFAULTS`."""

    mask_ratio: float = 0.6
    """Share of the cells of an image that are hidden; rounded up to whole cells."""
    mask_patch_size: int = 32
    """Side of a cell in pixels; a multiple of the decoder's stride, patch x 2^(stages - 1)."""
    norm_target: int | None = None
    """Standardise the pixels to draw by their neighbourhood of so many pixels, odd (47 in the V2 recipe)."""
    picture_every_steps: int | None = 1000
    """Steps between pictures of reconstructions; null: only at the end."""
    pictures: int = 8
    """Images on a picture: the first of data.val, or of data.train where there is none; 0: no pictures."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["adamw", "fused_adam", "apex_fused_adam", "apex_fused_lamb", "sgd"] = "adamw"
    """`adamw`: torch's fused one, on CUDA and CPU. `fused_adam`: the same update by DeepSpeed's CUDA kernel, a copy of
    Apex's; `apex_fused_adam`: by NVIDIA Apex's own. `apex_fused_lamb`: LAMB, at zero_stage 0 only. `sgd`: Nesterov."""
    lr: float | None = None
    """Absolute peak learning rate. Set this or lr_per_512."""
    lr_per_512: float | None = None
    """Peak learning rate for a global batch of 512, scaled linearly (the numbers of the official configs)."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    """Nesterov momentum of sgd."""
    clip_grad: float = 5.0
    """Global gradient norm to clip to; 0 means off."""
    layer_decay: float = 1.0
    """Factor of the learning rate per layer, counted from the head; 1 means off."""
    label_smoothing: float = 0.1
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights; 0 means off."""


ADAMW = ("adamw", "fused_adam", "apex_fused_adam")
"""Values of optim.name with one update rule and one state: a run may go on with another of them."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate as a pure function of the step. warmup_lr and min_lr are in the unit that `optim` sets lr in."""

    name: Literal["cosine", "linear", "step", "multistep"] = "cosine"
    total_steps: int | None = None
    """Length; unset: train.epochs x steps per epoch."""
    warmup_epochs: float = 20
    warmup_steps: int | None = None
    """Overrides warmup_epochs."""
    warmup_lr: float = 5e-7
    min_lr: float = 5e-6
    warmup_prefix: bool = True
    """Cosine starts after the warm-up; false starts it at step 0 (how all released weights were trained)."""
    decay_epochs: float = 30
    """`step`: epochs between decays by decay_rate."""
    decay_rate: float = 0.1
    multisteps: tuple[float, ...] = ()
    """`multistep`: epochs at which the rate is multiplied by gamma."""
    gamma: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Train:
    global_batch: int
    micro_batch: int | Literal["auto"] = "auto"
    """Samples per rank and forward; `auto` is the largest that divides: no accumulation."""
    epochs: int = 300
    max_steps: int | None = None
    """Stop after this many steps; does not change the schedule."""
    eval_every_epochs: int = 1
    """Epochs between evaluations; 0 means only at the end."""
    eval_batch: int | None = None
    """Samples per rank and forward in evaluation; unset: the micro-batch."""
    log_every: int = 10
    """Steps between writes of metrics (each step has its row) and progress lines."""
    tensorboard: bool = True
    max_skips: int = 20
    """Skipped updates in a row after which the run ends with exit code 5."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is cut over the ranks: nothing (fp32 only), optimizer state, gradients too, parameters too."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the model's parameters, activations and gradients. With bf16 and fp16 the optimizer holds fp32 masters and
    moments, and logit scales, l2 norms, softmax, position-bias MLPs, gates and losses compute in fp32; fp16 scales its
    loss dynamically. That is what Apex calls O2 ("pure fp16"); there is no autocast over fp32 parameters (O1, torch's
    AMP), which the official code trains with: for its recipes take bf16."""
    offload: Literal["none", "optimizer"] = "none"
    """Keep fp32 masters and moments in host memory and update them there (stages 1 to 3)."""
    activation_checkpointing: Literal["off", "block", "selective"] = "off"
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Who computes attention, residual norms, patch merging and dispatch to experts. `auto`: Triton on GPUs that all
    ranks have and that can, else torch. `triton`: Triton, or the run is refused. `reference`: torch. The log says."""
    layer_norm: Literal["torch", "apex"] = "torch"
    """Who computes LayerNorms that no Triton kernel of ours serves: torch, or NVIDIA Apex's FusedLayerNorm."""
    bucket_mb: float = 200.0
    """Megabytes per gradient bucket."""
    threads: int | None = None
    """CPU threads per rank; unset: cores / ranks on this machine."""
    timeout_s: float = 600.0
    """Seconds after which a collective is given up."""
    hang_timeout_s: float = 240.0
    """Seconds without progress after which a rank may count as hung: at least these, and five times longer than the
    section it is in ever took. Its stacks are kept below ``crash/``, and the run ends with code 6; 0: nobody watches.
    Before a section is known, 0.9 x timeout_s; 3 x timeout_s for loading, saving and evaluation."""


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    every_steps: int | None = None
    every_minutes: float | Literal["auto"] | None = "auto"
    """Also after so many minutes. `auto`: by Young and Daly, from what a save of this run stalls it for and how often
    the run fails (`swin_scale.interval`): 5 minutes to 2 hours, the first one after 5 minutes."""
    keep: int = 3
    """Newest checkpoints to keep, at least 2."""
    keep_every_hours: float | None = None
    """Also keep, for good, the first one past every multiple of this many hours of training (restarts add up)."""
    keep_best: int = 0
    """Also keep so many with the best evaluations: highest top-1, or lowest loss where there are no labels; the better
    one of weights and moving average counts. A step that is among them when it is evaluated is saved."""
    mode: Literal["async", "sync"] = "async"
    """`async`: a step waits for a copy of the state in memory, which a process beside each rank writes. That takes as
    much host memory as the rank's file; where there is not so much, the run says so and saves as with `sync`: the step
    waits for the disk."""
    wait_s: float = 30.0
    """A save that falls due while the one before is being written waits for it so long, and is left out then."""
    write_timeout_s: float = 1800.0
    """A save that is not on the disk after so long has failed; also what the last one, and that of a run that is asked
    to end, may take."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The loss guard (`engine/guard.py`): on a loss or gradient norm that is not finite, or a spike, the run goes back
    to its newest checkpoint and leaves out the samples that caused it."""

    enabled: bool = True
    loss_factor: float = 2.0
    """A loss is a spike if above so many times the median of the window, and also by `deviations` and by half of the
    loss the run began with; 0 looks for no spikes of the loss."""
    norm_factor: float = 20.0
    """The same for the norm of the gradient before clipping, which varies far more in a healthy run."""
    deviations: float = 10.0
    """Robust standard deviations (1.4826 x the median absolute deviation) above the median, the least of a spike."""
    window: int = 128
    """Accepted steps that the medians are taken over."""
    warmup: int = 32
    """Accepted steps before any can be a spike."""
    max_rollbacks: int = 8
    """Times a run may go back within `budget_steps`; then it ends with exit code 5."""
    budget_steps: int = 10_000


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a run watches in its ranks: who is slow (`engine/stragglers.py`), whose copies of the weights differ
    (`engine/replicas.py`)."""

    stragglers_every: int = 100
    """Steps between comparisons of the ranks' seconds by section and host; 0: never."""
    replicas_every: int = 1000
    """Steps between comparisons of what several ranks hold alike, bit for bit, which also come before every checkpoint;
    0: never."""


@dataclass(frozen=True, kw_only=True)
class Init:
    weights: str | None = None
    """Start from these weights (any checkpoint `convert` reads); a resumed run ignores it."""
    ema: bool = False
    """Take the moving average of `weights` instead of the trained ones."""
    head: Literal["auto", "keep", "zero", "trunc_normal", "map22kto1k"] = "auto"
    """What the classifier starts from. `keep`: that of `weights`, of as many classes; `map22kto1k`: its rows of the
    1,000 classes among 21,841; `zero`; `trunc_normal`: anew, as the model's own layers do (std 0.02, zero biases).
    `auto`: keep an equal one, map 21,841 to 1,000, zero for other classes, anew where `weights` have none (SimMIM)."""
    upcycle: bool = False
    """`weights` are of the dense model: each expert starts as a copy of its MLP (Komatsuzaki et al., 2023)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run
    task: Literal["classify", "simmim"] = "classify"
    """`simmim` needs no labels. What differs between the tasks is in `swin_scale.tasks`."""
    data: Data
    augment: Augment = field(default_factory=Augment)
    model: Model
    moe: MoE = field(default_factory=MoE)
    simmim: SimMIM = field(default_factory=SimMIM)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    guard: Guard = field(default_factory=Guard)
    health: Health = field(default_factory=Health)
    init: Init = field(default_factory=Init)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is cut: micro x accumulation x ranks = global."""

    global_batch: int
    per_rank: int
    micro: int
    accumulation: int
    ranks: int


def batch_plan(config: Config, ranks: int) -> BatchPlan:
    """Cut the global batch over `ranks`; raises UserError naming the nearest counts that divide."""
    batch = config.train.global_batch
    if batch % ranks:
        below = max(n for n in range(1, ranks + 1) if batch % n == 0)
        above = next((n for n in range(ranks, batch + 1) if batch % n == 0), batch)
        raise UserError(
            f"train.global_batch {batch} does not divide over {ranks} ranks; use {below} or {above} ranks, or a "
            f"global batch of {batch - batch % ranks or ranks} or {batch + ranks - batch % ranks}"
        )
    per_rank = batch // ranks
    micro = per_rank if config.train.micro_batch == "auto" else config.train.micro_batch
    if per_rank % micro:
        divisors = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        near = min(divisors, key=lambda n: (abs(n - micro), n))
        raise UserError(
            f"train.micro_batch {micro} does not divide the {per_rank} samples per rank "
            f"(global batch {batch} over {ranks} ranks); the nearest that does is {near}"
        )
    if config.augment.mixes and micro % 2:
        raise UserError(
            f"the micro-batch is {micro}, but mixup and cutmix pair neighbours, so it must be even; "
            "change train.micro_batch, or set augment.mixup_prob=0"
        )
    if ranks % config.moe.ep_size:
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise UserError(f"moe.ep_size {config.moe.ep_size} does not divide the {ranks} ranks; choose one of {divisors}")
    return BatchPlan(global_batch=batch, per_rank=per_rank, micro=micro, accumulation=per_rank // micro, ranks=ranks)


def learning_rate_scale(config: Config) -> float:
    """Factor from the learning rates in the config to absolute ones: global batch / 512 with lr_per_512, else 1."""
    return config.train.global_batch / 512 if config.optim.lr_per_512 is not None else 1.0
