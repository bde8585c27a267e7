import pytest
import torch
import torch.nn.functional as F

from swin_scale.bench import peers
from swin_scale.bench.model import randomise
from swin_scale.bench.peers import Contestant, PeerMissing
from swin_scale.models import create_model, variant

SMALL = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 1, 2),
    "num_heads": (1, 2, 4),
    "num_classes": 7,
    "drop_path_rate": 0.0,
}
NAME = "swinv2_nano_patch4_window4_32"


@pytest.fixture(scope="module")
def ours():
    return randomise(create_model(NAME, **SMALL)).double()


@pytest.mark.parametrize("build", [peers.timm, peers.huggingface])
def test_same_logits_and_gradients_through_the_name_map(ours, build):
    peer = build(variant(NAME, **SMALL))
    names = dict(ours.named_parameters())
    peer.module.double().train()
    peer.take(names)
    x, labels = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 5])
    own = Contestant(name="ours", module=ours)
    for one in (own, peer):
        one.module.zero_grad()
        F.cross_entropy(one.logits(x), labels).backward()
    # timm and Hugging Face hold their coordinate tables in fp32, whatever the model's dtype.
    torch.testing.assert_close(peer.logits(x), own.logits(x), rtol=0, atol=1e-6)
    wanted, got = own.gradients(names), peer.gradients(names)
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_parameter_without_counterpart_is_named(ours):
    peer = peers.timm(variant(NAME, **SMALL))
    names = dict(ours.named_parameters())
    with pytest.raises(PeerMissing, match=r"counterpart of our layers\.0\.blocks\.1\.enorm\.weight"):
        peer.take({"layers.0.blocks.1.enorm.weight": torch.zeros(16), **names})
    head = names.pop("head.weight")
    with pytest.raises(PeerMissing, match=r"no counterpart of its head\.fc\.weight"):
        peer.take(names)
    with pytest.raises(PeerMissing, match=r"head\.weight has shape"):
        peer.take({**names, "head.weight": head[:3]})


def test_without_a_checkout_the_official_code_is_missing_with_the_remedy(tmp_path):
    v = variant(NAME, **SMALL)
    with pytest.raises(PeerMissing, match="--official DIR"):
        peers.official(v, None)
    with pytest.raises(PeerMissing, match=r"no models/swin_transformer_v2\.py"):
        peers.official(v, str(tmp_path))


def test_a_checkout_is_run_from_its_one_model_file(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/swin_transformer_v2.py").write_text(
        "import torch\n"
        "class SwinTransformerV2(torch.nn.Module):\n"
        "    def __init__(self, **arguments):\n"
        "        super().__init__()\n"
        "        self.arguments = arguments\n"
    )
    arguments = peers.official(variant(NAME, **SMALL), str(tmp_path)).module.arguments
    assert arguments["depths"] == (2, 1, 2) and arguments["drop_path_rate"] == 0.0


def test_a_package_that_is_not_there_is_a_missing_peer():
    with pytest.raises(PeerMissing, match="pip install no_such_package"):
        peers._import("no_such_package")


def test_huggingface_names_cover_the_merged_projection():
    assert peers.huggingface_names("layers.1.blocks.0.attn.qkv.weight") == tuple(
        f"swinv2.encoder.layers.1.blocks.0.attention.self.{part}.weight" for part in ("query", "key", "value")
    )
