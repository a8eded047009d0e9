"""How good the nets in training are, on a fixed set of unaugmented training images: no test image is ever touched."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from edgecl.config.recipe import Data, Host
from edgecl.data.loading import load_eval_images, normalize
from edgecl.data.source import ImageSource
from edgecl.metrics.collapse import extract_features, knn_top1, rank_me
from edgecl.nets.backbone import create_backbone, recalibrate
from edgecl.nets.build import backbone_tensors
from edgecl.nets.slimming import SlimmableNet, limit_skips
from edgecl.train.carve import RECALIBRATION_BATCH

IMAGES = 2048
# Of them, for the norms of a net that has not learnt yet.
NORM_IMAGES = 512


class QualityWatch:
    """Measures the nets as they would be carved: evaluation mode, backbone only; each process runs its share of the images.

    Raises:
        DataError: none of the images can be read.
    """

    def __init__(self, source: ImageSource, *, images: int, data: Data, host: Host, accelerator: Accelerator):
        loaded = load_eval_images(
            source,
            resize_size=data.resize_size or data.image_size,
            image_size=data.image_size,
            # The limit is for all images; a part of them may have more.
            max_bad_fraction=1.0,
            limit=min(IMAGES, images),
            read_timeout_s=data.read_timeout_s,
        )
        self._data, self._host = data, host
        self._accelerator = accelerator
        self._count = len(loaded.images)
        self._share = loaded.images.tensor_split(accelerator.num_processes)[accelerator.process_index]
        self._labels = loaded.labels
        # The same in every process, so that their nets are the same.
        self._norm_images = loaded.images[:: max(1, self._count // NORM_IMAGES)][:NORM_IMAGES]
        self.shape = (0, 0)
        """(N, F) of the features that were looked at last: the slim net's, the host's where there is none."""

    def measure(self, net: SlimmableNet, *, untrained: bool = False) -> dict[str, float | None]:
        """Return RankMe and, where there are labels, kNN accuracy of host and slim nets; every process must call.

        Args:
            untrained: before the first step, when running statistics say nothing: estimate the norms, as for the
                random net that a carved one is compared with. (Without, features of the demo's random net, hardly
                changed pixels, reach kNN 62 %; with, 26 %.)

        Returns:
            "rankme_host", "knn_top1_host", "rankme_slim", "knn_top1_slim", and with "_at_WIDTH" behind it those of
            the further slim widths; None where there is no such net, or there are no labels, and NaN where the
            features are not finite.
        """
        names = {"host": net.host_width, "slim": net.slim_width}
        names.update({f"slim_at_{width:g}": width for width in net.slim_widths[1:]})
        record: dict[str, float | None] = {}
        for name, width in names.items():
            record[f"rankme_{name}"] = record[f"knn_top1_{name}"] = None
            if name == "slim" and not net.has_slim:
                continue
            features = self._features(net, width, untrained=untrained)
            if name in ("host", "slim"):
                self.shape = (features.shape[0], features.shape[1])
            finite = bool(torch.isfinite(features).all())
            record[f"rankme_{name}"] = rank_me(features) if finite else math.nan
            record[f"knn_top1_{name}"] = self._knn(features) if finite else None
        return record

    def _features(self, net: SlimmableNet, width: float, *, untrained: bool) -> Tensor:
        host, data = self._host, self._data
        with torch.random.fork_rng():
            backbone = create_backbone(host.arch, width=width, stem_stride=host.stem_stride)
        if width == net.host_width:
            prefix = "backbone."
            limit_skips(backbone, {name.removeprefix(prefix): n for name, n in net.host_skips.items()})
        backbone.load_state_dict(backbone_tensors(net, width=width))
        backbone.to(self._accelerator.device)
        if untrained:
            batches = (part for part in self._norm_images.split(RECALIBRATION_BATCH) if len(part) > 1)
            with torch.random.fork_rng():
                recalibrate(
                    backbone,
                    (normalize(part, data.mean, data.std) for part in batches),
                    device=self._accelerator.device,
                )
        if self._accelerator.num_processes > 1:
            # Norms that are not synchronized differ; the first process's are those of the checkpoint.
            for buffer in backbone.buffers():
                torch.distributed.broadcast(buffer, src=0)
        features = extract_features(
            backbone, self._share, normalize=lambda part: normalize(part, data.mean, data.std)
        )
        shares: list[Tensor] = gather_object([features])
        return torch.cat(shares)

    def _knn(self, features: Tensor) -> float | None:
        """Classify every other image by its neighbors among the rest."""
        if self._labels is None:
            return None
        return knn_top1(features[::2], self._labels[::2], features[1::2], self._labels[1::2])


def quality_of(record: Mapping[str, float | None]) -> dict[str, str | float] | None:
    """Choose by which number of a quality record checkpoints compare: kNN accuracy, or RankMe without labels."""
    for kind in ("knn_top1", "rankme"):
        for net in ("slim", "host"):
            value = record.get(f"{kind}_{net}")
            if value is not None:
                return {"name": f"{kind}_{net}", "value": value}
    return None
