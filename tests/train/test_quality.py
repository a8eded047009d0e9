"""Looks at quality are of the nets that train."""

import torch
from accelerate import Accelerator

from edgecl.data.loading import normalize
from edgecl.data.sources import open_source
from edgecl.metrics.collapse import extract_features
from edgecl.nets.backbone import create_backbone
from edgecl.nets.build import create_slimmable
from edgecl.train.quality import QualityWatch


def test_a_look_at_a_nested_host_skips_as_it_does(make_recipe, pictures):
    recipe = make_recipe(
        "host.arch=mobilenetv3_small_050", "host.width=1.5", "slim.width=1.0", "host.nested_start=true"
    )
    torch.manual_seed(0)
    net = create_slimmable(recipe)
    assert net.host_skips
    for _ in range(3):
        net.forward_host(torch.randn(8, 3, 32, 32))
    watch = QualityWatch(
        open_source(str(pictures)),
        images=40,
        data=recipe.data,
        host=recipe.host,
        accelerator=Accelerator(cpu=True),
    )

    def features(backbone):
        return extract_features(
            backbone, watch._share, normalize=lambda part: normalize(part, recipe.data.mean, recipe.data.std)
        )

    found = watch._features(net, net.host_width, untrained=False)
    host = net.host.get_submodule("backbone").eval()
    torch.testing.assert_close(found, features(host), rtol=1e-5, atol=1e-6)
    # With timm's own skip connections it would be another net.
    plain = create_backbone("mobilenetv3_small_050", width=1.5, stem_stride=2)
    plain.load_state_dict(host.state_dict())
    assert not torch.allclose(found, features(plain), rtol=1e-2)
