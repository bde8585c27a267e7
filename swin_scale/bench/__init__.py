"""Side-by-side measurements: ours against other people's code in one process, on the same weights and inputs."""

PEERS = ("official", "timm", "huggingface")
"""What `bench model` compares with."""

MOE_PEERS = ("dense", "tutel", "deepspeed", "one-hot")
"""What `bench moe` compares with."""
