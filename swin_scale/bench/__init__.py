"""Side-by-side measurements: ours against other people's code in one process, on the same weights and inputs."""

PEERS = ("official", "timm", "huggingface", "official-amp", "reference")
"""What `bench model` compares with: codes of others, the official one under AMP, and ours without kernels."""

MOE_PEERS = ("dense", "tutel", "deepspeed", "one-hot")
"""What `bench moe` compares with."""

KERNEL_PEERS = (
    "official-amp",
    "official",
    "sdpa",
    "compile",
    "sdpa-compile",
    "flex",
    "fwa-2",
    "official-code",
    "ours-atomic",
    "ours-chunked",
    "autotuned",
)
"""What `bench kernels` compares with: the official chain of operations under AMP and in the dtype throughout, torch's
fused attention with an additive mask, both of these compiled, FlexAttention, Flash Window Attention V2, the
official module itself, our atomic sum of the bias's gradient, ours in plain torch, and the chain compiled with
autotuning."""
