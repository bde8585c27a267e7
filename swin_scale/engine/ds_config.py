"""From our config to DeepSpeed's: a pure function."""

from __future__ import annotations

from typing import Any

from swin_scale.config import BatchPlan, Config

FP16_INITIAL_SCALE_POWER = 16
FP16_SCALE_WINDOW = 2000


def to_deepspeed(config: Config, plan: BatchPlan, *, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's JSON config for one run.

    Gradients accumulate in fp32 whenever there is more than one micro-batch; bf16 gradients are also summed over ranks
    in fp32. Batch arithmetic comes ready from `batch_plan`.
    """
    precision = config.engine.precision
    bucket = max(int(config.engine.bucket_mb * 1e6 / (4 if precision == "fp32" else 2)) // 2 * 2, 2)
    settings: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optim.clip_grad,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            # Gloo has no streams to overlap on, and there the order of reductions stays fixed.
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "fp32"
    elif precision == "fp16":
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": FP16_INITIAL_SCALE_POWER,
            "loss_scale_window": FP16_SCALE_WINDOW,
            "hysteresis": 1,
            "min_loss_scale": 1,
        }
    if precision != "fp32" and plan.accumulation > 1:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
