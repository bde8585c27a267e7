"""What makes a value of the configuration invalid, as far as can be known before a file or a device is opened."""

from __future__ import annotations

from swin_scale.config import Config, MoE, SimMIM
from swin_scale.errors import UserError


def validate(config: Config) -> None:
    """Check every value that can be judged without files or devices; raises UserError naming the key."""
    positive = {
        "data.prefetch": config.data.prefetch,
        "data.block": config.data.block,
        "data.max_pixels": config.data.max_pixels,
        "train.global_batch": config.train.global_batch,
        "train.epochs": config.train.epochs,
        "train.log_every": config.train.log_every,
        "train.max_skips": config.train.max_skips,
        "engine.bucket_mb": config.engine.bucket_mb,
        "engine.timeout_s": config.engine.timeout_s,
        "optim.layer_decay": config.optim.layer_decay,
        "optim.eps": config.optim.eps,
        "moe.ep_size": config.moe.ep_size,
        "checkpoint.write_timeout_s": config.checkpoint.write_timeout_s,
        "guard.deviations": config.guard.deviations,
        "guard.budget_steps": config.guard.budget_steps,
    }
    minutes = config.checkpoint.every_minutes
    optional = {
        "train.micro_batch": None if config.train.micro_batch == "auto" else config.train.micro_batch,
        "train.max_steps": config.train.max_steps,
        "train.eval_batch": config.train.eval_batch,
        "schedule.total_steps": config.schedule.total_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.every_minutes": None if minutes == "auto" else minutes,
        "checkpoint.keep_every_hours": config.checkpoint.keep_every_hours,
        "engine.threads": config.engine.threads,
        "optim.lr": config.optim.lr,
        "optim.lr_per_512": config.optim.lr_per_512,
        "moe.experts": config.moe.experts,
        "moe.top_k": config.moe.top_k,
        "moe.cosine_dim": config.moe.cosine_dim,
        "moe.cosine_init_t": config.moe.cosine_init_t,
        "moe.a2a_chunks": config.moe.a2a_chunks,
        "simmim.mask_patch_size": config.simmim.mask_patch_size,
        "simmim.picture_every_steps": config.simmim.picture_every_steps,
    }
    for key, value in {**positive, **{k: v for k, v in optional.items() if v is not None}}.items():
        if not value > 0:
            raise UserError(f"{key} is {value}; it must be above 0")
    not_negative = {
        "run.seed": config.run.seed,
        "data.workers": config.data.workers,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.clip_grad": config.optim.clip_grad,
        "schedule.warmup_epochs": config.schedule.warmup_epochs,
        "schedule.warmup_steps": config.schedule.warmup_steps or 0,
        "train.eval_every_epochs": config.train.eval_every_epochs,
        "augment.mixup": config.augment.mixup,
        "augment.cutmix": config.augment.cutmix,
        "moe.gate_noise": config.moe.gate_noise or 0.0,
        "moe.aux_weight": config.moe.aux_weight or 0.0,
        "moe.z_weight": config.moe.z_weight or 0.0,
        "simmim.pictures": config.simmim.pictures,
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "checkpoint.wait_s": config.checkpoint.wait_s,
        "engine.hang_timeout_s": config.engine.hang_timeout_s,
        "guard.max_rollbacks": config.guard.max_rollbacks,
        "health.stragglers_every": config.health.stragglers_every,
        "health.replicas_every": config.health.replicas_every,
    }
    for key, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"{key} is {value}; it must not be negative")
    fractions = {
        "data.max_bad_rate": config.data.max_bad_rate,
        "augment.hflip": config.augment.hflip,
        "augment.reprob": config.augment.reprob,
        "augment.mixup_prob": config.augment.mixup_prob,
        "augment.mixup_switch_prob": config.augment.mixup_switch_prob,
        "optim.label_smoothing": config.optim.label_smoothing,
        "optim.ema_decay": config.optim.ema_decay,
    }
    for key, value in fractions.items():
        if not 0 <= value <= 1:
            raise UserError(f"{key} is {value}; it must lie between 0 and 1")
    if not config.data.train:
        raise UserError("data.train is empty; name at least one shard directory")
    if config.data.weights and len(config.data.weights) != len(config.data.train):
        raise UserError(
            f"data.weights has {len(config.data.weights)} values for {len(config.data.train)} directories in data.train"
        )
    if any(not weight > 0 for weight in config.data.weights):
        raise UserError(f"data.weights is {list(config.data.weights)}; every weight must be above 0")
    if config.init.upcycle and config.init.weights is None:
        raise UserError("init.upcycle is true without init.weights; name the dense model's weights, or leave it out")
    if (config.optim.lr is None) == (config.optim.lr_per_512 is None):
        raise UserError(
            f"set exactly one of optim.lr (absolute) and optim.lr_per_512; they are {config.optim.lr} and "
            f"{config.optim.lr_per_512}"
        )
    if config.checkpoint.keep < 2:
        raise UserError(
            f"checkpoint.keep is {config.checkpoint.keep}; keep at least 2, so that a damaged one does not lose the run"
        )
    if config.checkpoint.keep_best and not config.data.val:
        raise UserError(
            f"checkpoint.keep_best is {config.checkpoint.keep_best}, and data.val is empty; name shards to evaluate "
            "on, or leave it out"
        )
    if config.engine.zero_stage == 0 and config.engine.precision != "fp32":
        raise UserError(
            f"engine.zero_stage is 0, which trains in fp32 only, and engine.precision is {config.engine.precision}; "
            "set engine.zero_stage=1 or engine.precision=fp32"
        )
    if config.engine.zero_stage == 0 and config.engine.offload != "none":
        raise UserError(
            f"engine.offload is {config.engine.offload}, which engine.zero_stage 0 does not have; "
            "set engine.zero_stage=1 or engine.offload=none"
        )
    _validate_optimizer(config)
    low, high = config.augment.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"augment.crop_scale is {[low, high]}; it must be two rising fractions of the area in (0, 1]")
    if config.schedule.name == "multistep" and not config.schedule.multisteps:
        raise UserError("schedule.multisteps is empty; list the epochs at which a multistep schedule decays")
    _validate_moe(config)
    _validate_task(config)
    _validate_guard(config)


def _validate_guard(config: Config) -> None:
    guard = config.guard
    for key in ("loss_factor", "norm_factor"):
        value = getattr(guard, key)
        if value != 0 and not value > 1:
            raise UserError(f"guard.{key} is {value}; it must be above 1, or 0 to look for no spikes")
    if not 4 <= guard.warmup <= guard.window <= 4096:
        raise UserError(
            f"guard.warmup is {guard.warmup} and guard.window {guard.window}; they must rise from 4 to 4096, since a "
            "median of fewer steps says nothing"
        )
    if any(sample < 0 for sample in config.data.exclude):
        raise UserError(f"data.exclude holds {min(config.data.exclude)}; sample ids are rows of the index, from 0")


def _validate_optimizer(config: Config) -> None:
    """What stands between an optimizer and the ZeRO stage; what this machine lacks for it is judged by the engine."""
    name, stage = config.optim.name, config.engine.zero_stage
    if name == "apex_fused_lamb" and stage != 0:
        raise UserError(
            f"optim.name is apex_fused_lamb, which scales updates by the norms of whole tensors, and engine.zero_stage "
            f"{stage} gives an optimizer pieces of them; set engine.zero_stage=0 and engine.precision=fp32, or "
            "optim.name=adamw"
        )
    if name == "apex_fused_adam" and stage == 3:
        raise UserError(
            "optim.name is apex_fused_adam, which counts its updates by group, and engine.zero_stage 3 updates a group "
            "in parts; set engine.zero_stage=2, or optim.name=fused_adam"
        )
    if name not in ("adamw", "sgd") and config.engine.offload == "optimizer":
        raise UserError(
            f"optim.name is {name}, which updates on the GPU, and engine.offload optimizer keeps its state in host "
            "memory; set optim.name=adamw, or engine.offload=none"
        )


def _validate_moe(config: Config) -> None:
    """What does not depend on the model's name; `check_experts` judges the rest."""
    moe, stage = config.moe, config.engine.zero_stage
    if moe.ep_size > 1 and stage in (0, 3):
        why = "does not know experts" if stage == 0 else "cuts experts over all ranks itself"
        raise UserError(
            f"moe.ep_size is {moe.ep_size}, and engine.zero_stage {stage} {why}; set engine.zero_stage=1 (or 2), or "
            "moe.ep_size=1"
        )
    if moe.backend == "tutel" and stage == 3:
        raise UserError(
            "engine.zero_stage is 3, which builds models without memory, and moe.backend tutel cannot; set "
            "engine.zero_stage=1 (or 2), or moe.backend=native"
        )
    if moe.backend == "tutel" and moe.aux_scope == "global":
        raise UserError(
            "moe.aux_scope is global, but moe.backend tutel balances each rank by itself; set moe.aux_scope=rank, or "
            "moe.backend=native"
        )


def _validate_task(config: Config) -> None:
    """What belongs to one task alone, and the values of simmim; its task judges what depends on the model's name."""
    simmim, defaults = config.simmim, SimMIM()
    if config.task != "simmim":
        given = [name for name in vars(defaults) if getattr(simmim, name) != getattr(defaults, name)]
        if given:
            raise UserError(
                f"simmim.{given[0]} is {getattr(simmim, given[0])!r}, but task is {config.task}; leave it out, or set "
                "task=simmim"
            )
        return
    pointless = {
        "augment.mixup": config.augment.mixup,
        "augment.cutmix": config.augment.cutmix,
        "optim.label_smoothing": config.optim.label_smoothing,
        "model.num_classes": config.model.num_classes,
    }
    for key, value in pointless.items():
        if value:
            raise UserError(f"{key} is {value}, but task simmim uses no labels; leave it out, or set task=classify")
    if config.augment.reprob:
        raise UserError(
            f"augment.reprob is {config.augment.reprob}, but what is erased task simmim would learn to draw; leave it "
            "out, or set augment.reprob=0"
        )
    if not 0 < simmim.mask_ratio < 1:
        raise UserError(f"simmim.mask_ratio is {simmim.mask_ratio}; it must lie between 0 and 1 (0.6 in the recipes)")
    if simmim.norm_target is not None and (simmim.norm_target < 3 or not simmim.norm_target % 2):
        raise UserError(
            f"simmim.norm_target is {simmim.norm_target}; it must be an odd number of pixels from 3 on (47 in the "
            "recipes), or null"
        )
    if config.moe.backend == "tutel":
        raise UserError("moe.backend is tutel, which task simmim cannot build yet; set moe.backend=native")


def check_experts(config: Config, experts: int | None) -> None:
    """Judge `config.moe` for a model of so many experts per layer, None for a dense one; raises UserError."""
    if experts is None:
        ours, defaults = config.moe, MoE()
        given = [name for name in vars(defaults) if getattr(ours, name) != getattr(defaults, name)]
        if given:
            raise UserError(
                f"moe.{given[0]} is {getattr(ours, given[0])!r}, but model.name {config.model.name} has no experts; "
                "leave it out, or name a model with experts"
            )
    elif experts % config.moe.ep_size:
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        raise UserError(
            f"moe.ep_size {config.moe.ep_size} does not divide moe.experts {experts}; choose one of {divisors}"
        )
