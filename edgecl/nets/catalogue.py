"""The nets that carry tests, named without importing torch."""

NETS = {
    "mobilenetv1_100": "MobileNet v1: depthwise-separable convolutions",
    "mobilenetv2_100": "MobileNet v2: inverted residuals",
    "mobilenetv3_large_100": "MobileNet v3 large: squeeze-and-excitation, hard-swish",
    "mobilenetv3_small_100": "MobileNet v3 small",
    "mobilenetv4_conv_small": "MobileNet v4 small, convolutions only",
    "efficientnet_b0": "EfficientNet B0: squeeze-and-excitation, SiLU",
    "efficientnet_lite0": "EfficientNet-Lite 0: no squeeze-and-excitation, ReLU6, made for integers",
    "resnet50": "ResNet-50, for comparison",
}


def list_nets() -> list[dict[str, str]]:
    """List nets that hold any narrower one of theirs at widths from 0.5 to 4; any other timm net may be tried."""
    return [{"name": name, "summary": summary} for name, summary in NETS.items()]
