"""From our config to DeepSpeed's: a pure function."""

from __future__ import annotations

from typing import Any

from swin_scale.config import BatchPlan, Config

FP16_INITIAL_SCALE_POWER = 16
FP16_SCALE_WINDOW = 2000
"""Updates without an overflow after which the loss scale doubles. Both are those of torch's GradScaler and Apex."""
STAGE3_RESIDENT_NUMEL = 100_000
"""Parameters of at most so many elements stay gathered under ZeRO-3: below it a gather costs more than the memory."""


def to_deepspeed(config: Config, plan: BatchPlan, *, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's JSON config for one run.

    Gradients accumulate in fp32 whenever there is more than one micro-batch; bf16 gradients are also summed over ranks
    in fp32. Batch arithmetic comes ready from `batch_plan`.
    """
    precision, stage = config.engine.precision, config.engine.zero_stage
    bucket = max(int(config.engine.bucket_mb * 1e6 / (4 if precision == "fp32" else 2)) // 2 * 2, 2)
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {
            # Gloo has no streams to overlap on, and there the order of reductions stays fixed.
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": STAGE3_RESIDENT_NUMEL,
            # It would replace torch.nn.functional.linear for the whole process, for good.
            "memory_efficient_linear": False,
        }
    if config.engine.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    settings: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        # At stage 0 our optimizer clips: DeepSpeed would not skip a non-finite update there.
        "gradient_clipping": config.optim.clip_grad if stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW updates offloaded state: DeepSpeed's own needs a C++ build at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "fp32"
    elif precision == "fp16":
        # Half-precision parameters, gradients and activations, fp32 masters and moments: what Apex calls O2.
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
