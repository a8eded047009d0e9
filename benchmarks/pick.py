"""Are labels of pictures that `edgecl pick` chooses worth more than labels of random ones? A table and one JSON line.

    python benchmarks/pick.py --model MODEL_DIR --data LABELLED --test LABELLED

The labels are hidden from the choice. Each draw has a pool of its own among the pictures, the same for every way to
choose, so that differences are paired; intervals are 95 % over draws. Accuracies are those of a linear classifier on
the frozen features of what was chosen, as `edgecl probe` fits it, and of the nearest chosen picture.

| way       | what is chosen of the pool                                                                              |
| --------- | ------------------------------------------------------------------------------------------------------- |
| random    | any                                                                                                     |
| k-centers | the picture that is farthest from all chosen ones, again and again (Sener and Savarese 2018)             |
| pick      | edgecl.metrics.diversity: the most typical picture of each of so many groups                             |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from timing import options_of, table
from torch import Tensor
from torch.nn import functional

from edgecl.data.loading import normalize
from edgecl.evaluate.labelled import Part, read_labelled
from edgecl.evaluate.probe import load_feature_net
from edgecl.metrics.collapse import extract_features
from edgecl.metrics.diversity import clusters, isolation, typical_first
from edgecl.metrics.intervals import mean_interval
from edgecl.metrics.linear import fit_linear


def at_random(features: Tensor, count: int, draw: int) -> Tensor:
    return torch.randperm(len(features), generator=torch.Generator().manual_seed(draw))[:count]


def k_centers(features: Tensor, count: int, draw: int) -> Tensor:
    unit = functional.normalize(features, dim=1)
    chosen = [int((unit @ unit.mean(0)).argmax())]
    distance = torch.full((len(unit),), torch.inf)
    while len(chosen) < count:
        distance = torch.minimum(distance, 2 - 2 * unit @ unit[chosen[-1]])
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)


def picked(features: Tensor, count: int, draw: int) -> Tensor:
    lonely = isolation(functional.normalize(features, dim=1))
    return typical_first(clusters(features, count, seed=draw), lonely)[:count]


WAYS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "random": at_random,
    "k-centers": k_centers,
    "pick": picked,
}
MEASURES = ("classes", "linear %", "nearest %")


def measure(features: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> list[float]:
    """Return how many classes the chosen pictures have, and two accuracies on test pictures."""
    linear = fit_linear(features, labels, classes=classes).top1(test, test_labels)
    near = (functional.normalize(test, dim=1) @ functional.normalize(features, dim=1).T).argmax(1)
    return [len(labels.unique()), linear, 100 * float((labels[near] == test_labels).float().mean())]


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--data", required=True)
    options.add_argument("--test", required=True)
    options.add_argument("--pool", type=int, default=10_000)
    options.add_argument("--draws", type=int, default=10)
    options.add_argument("--counts", type=int, nargs="+", default=[20, 50, 200])
    given = options.parse_args()
    net, record = load_feature_net(given.model)
    about = record.preprocessing
    labelled = read_labelled(given.data, test=given.test, preprocessing=about)

    def features_of(part: Part) -> Tensor:
        return extract_features(
            net, part.images, normalize=lambda batch: normalize(batch, about.mean, about.std)
        )

    features, test = features_of(labelled.train), features_of(labelled.test)
    found: dict[tuple[int, str], list[list[float]]] = {}
    for draw in range(given.draws):
        random = torch.Generator().manual_seed(1000 + draw)
        pool = torch.randperm(len(features), generator=random)[: given.pool]
        for count in given.counts:
            for name, choose in WAYS.items():
                rows = pool[choose(features[pool], count, draw)]
                result = measure(
                    features[rows],
                    labelled.train.labels[rows],
                    test,
                    labelled.test.labels,
                    len(labelled.classes),
                )
                found.setdefault((count, name), []).append(result)
    print_table(found)
    results = [{"count": count, "way": name, "draws": draws} for (count, name), draws in found.items()]
    print(
        json.dumps({"benchmark": "pick", "model": str(given.model), "measures": MEASURES, "results": results})
    )


def print_table(found: dict[tuple[int, str], list[list[float]]]) -> None:
    rows = []
    for (count, name), draws in found.items():
        cells = []
        for place in range(len(MEASURES)):
            own = [draw[place] for draw in draws]
            cell = f"{sum(own) / len(own):.1f}"
            if name != "random" and len(own) > 1:
                differences = [
                    one[place] - other[place]
                    for one, other in zip(draws, found[count, "random"], strict=True)
                ]
                low, high = mean_interval(differences)
                cell += f" ({sum(differences) / len(differences):+.1f} [{low:+.1f}, {high:+.1f}])"
            cells.append(cell)
        rows.append([str(count), name, *cells])
    print(table(["labels", "way", *MEASURES], rows))


if __name__ == "__main__":
    main()
