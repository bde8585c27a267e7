"""Files as the official Swin-MoE code leaves them, written from what is known of its saver and of Tutel's shapes."""

import math

import torch

from swin_scale import create_model

MOE = "swin_moe_nano_patch4_window4_32"


def filled(model, seed=0, *, fc2_bias=False):
    """`model` with random values everywhere, but in second biases of experts unless `fc2_bias`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if fc2_bias or not name.endswith("batched_fc2_bias"):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def moe_model(experts=8, seed=0, name=MOE, fc2_bias=False, **overrides):
    moe = {"num_experts": experts, **overrides.pop("moe", {})}
    return filled(create_model(name, seed=seed, moe=moe, **overrides), seed, fc2_bias=fc2_bias)


def rank_part(name, whole, rank, ranks, *, legacy=False):
    """What `rank` of `ranks` holds of an expert tensor: whole experts, or a run of one expert's hidden units."""
    experts = whole.shape[0]
    if experts >= ranks:
        each = experts // ranks
        part = whole[rank * each : (rank + 1) * each]
    else:
        sharing = ranks // experts
        expert, slot = whole[rank // sharing], rank % sharing
        width = math.ceil(expert.shape[0] / sharing)
        part = torch.zeros(1, width, *expert.shape[1:])  # Tutel rounds up the width of the second bias
        rows = expert[slot * width : (slot + 1) * width]
        part[0, : len(rows)] = rows
    if legacy and name.endswith("bias"):
        part = part.unsqueeze(1)
    return part.clone()


def rank_states(state, ranks, *, legacy=False, frozen=True):
    """(experts of every rank, everything else), as the official saver splits them at the end of training."""
    files, master = [{} for _ in range(ranks)], {}
    for key, tensor in state.items():
        if ".experts." not in key:
            master[key] = tensor
            continue
        for rank in range(ranks):
            files[rank][key] = rank_part(key, tensor, rank, ranks, legacy=legacy)
        if frozen and key.endswith("batched_fc2_bias"):  # not trained, so it is not in the list of the rank files
            master[key] = files[0][key]
            for file in files:
                del file[key]
        if not legacy and key.endswith("batched_fc1_w"):
            master[key.replace("experts.batched_fc1_w", "_num_global_experts")] = torch.tensor(len(tensor))
    return files, master


def write_ranks(directory, state, ranks, *, stem="swin.pth", whole=False, **options):
    """Rank files in `directory`: with a master file, or `whole` as during training, every file with everything."""
    directory.mkdir(exist_ok=True)
    files, master = rank_states(state, ranks, frozen=not whole and options.pop("frozen", True), **options)
    for rank, file in enumerate(files):
        content = {"model": {**master, **file}, "epoch": 3} if whole else {"model": file}
        torch.save(content, directory / f"{stem}.rank{rank}")
    if not whole:
        torch.save({"model": master}, directory / f"{stem}.master")
    return directory
