"""Models on a GPU against themselves in fp64 on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from swin_scale.bench.model import randomise
from swin_scale.models import create_model

pytestmark = pytest.mark.gpu

# Windows of 64 and 144 tokens, shifted and not, and a last stage that one window covers.
SHAPES = {
    "w8": {"img_size": 128, "window_size": 8},
    "w12": {"img_size": 192, "window_size": 12, "pretrained_window_sizes": (6, 6, 6)},
}
SMALL = {"embed_dim": 64, "depths": (2, 2, 1), "num_heads": (2, 4, 8), "num_classes": 11, "drop_path_rate": 0.0}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def outcome(model, x, labels):
    logits = model(x)
    F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    grads = torch.cat([p.grad.double().cpu().flatten() for p in model.parameters()])
    return logits.detach().double().cpu(), grads


@pytest.mark.parametrize("checkpointing", ["off", "block", "selective"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["swinv2_nano_patch4_window4_32", "swin_nano_patch4_window4_32"])
def test_logits_and_gradients_agree_with_fp64(name, shape, dtype, checkpointing):
    values = {**SMALL, **SHAPES[shape], "activation_checkpointing": checkpointing}
    if name.startswith("swin_"):
        values.pop("pretrained_window_sizes", None)
    x = torch.randn(2, 3, values["img_size"], values["img_size"], generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 7])
    reference = randomise(create_model(name, **values)).double()
    model = randomise(create_model(name, **values)).to("cuda", dtype)
    wanted, wanted_grads = outcome(reference, x.double(), labels)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got, grads = outcome(model, x.to("cuda", dtype), labels.cuda())
    assert (got - wanted).norm() <= LIMITS[dtype] * wanted.norm()
    assert (grads - wanted_grads).norm() <= 4 * LIMITS[dtype] * wanted_grads.norm()


def test_position_bias_cache_on_the_gpu_follows_its_parameters():
    model = create_model("swinv2_nano_patch4_window4_32").cuda().eval()
    randomise(model.cpu()).cuda()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        first, again = model(x), model(x)
    assert torch.equal(first, again)
    with torch.no_grad():
        model.layers[0].blocks[0].attn.cpb_mlp[2].weight.mul_(3)
    with torch.inference_mode():
        assert not torch.equal(model(x), first)
