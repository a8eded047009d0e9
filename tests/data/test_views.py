import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from edgecl.config.views import Views, ViewSpec
from edgecl.data.loading import Batch
from edgecl.data.views import draw_parameters, make_views, render_view, write_views_grid

PLAIN = Views(
    crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0, grayscale=0, blur=(0, 0), solarize=(0, 0)
)
NO_MEAN, NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
N, SIDE = 48, 32


def settings(**changes):
    return PLAIN.model_copy(update=changes)


def pictures(count=N, side=SIDE):
    """Smooth colors and some noise, every value in 0..255 met."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.random((count, 3, 5, 5), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noise = torch.from_numpy(random.normal(0, 0.05, smooth.shape).astype(np.float32))
    return ((smooth * 1.4 - 0.2 + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def batch_of(images, size=None):
    count, side = len(images), images.shape[-1]
    sizes = torch.tensor([size or (side, side)] * count, dtype=torch.int32)
    return Batch(np.arange(count), images, sizes)


def spec_of(views, name="a", side=SIDE):
    """Return the specification of the view of this name."""
    (spec,) = (spec for spec in views.specs(side, whole=26) if name in spec.names)
    return spec


def draw(views, *, count=N, size=(SIDE, SIDE), view="a", side=SIDE, seed=0, epoch=0):
    sizes = np.tile(np.array(size), (count, 1))
    spec = spec_of(views, view, side)
    return draw_parameters(np.arange(count), sizes, spec, name=view, seed=seed, epoch=epoch)


def render(views, images=None, size=None, side=SIDE):
    """Return pictures in 0..1, view A and its parameters."""
    batch = batch_of(pictures() if images is None else images, size)
    sizes = batch.sizes.numpy()
    spec = spec_of(views, side=side)
    parameters = draw_parameters(batch.indices, sizes, spec, name="a", seed=0, epoch=0)
    scaled = batch.images.float() / 255
    return scaled, render_view(scaled, sizes, parameters, spec), parameters


def each(operator, images, *columns):
    return torch.stack([operator(image, *values) for image, *values in zip(images, *columns, strict=True)])


COLOR_OPERATORS = [
    ("brightness", 0, reference.adjust_brightness),
    ("contrast", 1, reference.adjust_contrast),
    ("saturation", 2, reference.adjust_saturation),
    ("hue", 3, reference.adjust_hue),
]


@pytest.mark.parametrize(("name", "column", "operator"), COLOR_OPERATORS)
def test_color_operators_equal_torchvisions(name, column, operator):
    before, after, parameters = render(settings(jitter=1.0, **{name: 0.5}, **others_off(name)))
    torch.testing.assert_close(
        after, each(operator, before, parameters.factors[:, column]), atol=2e-4, rtol=0
    )


def others_off(name):
    return {other: 0.0 for other in ("brightness", "contrast", "saturation", "hue") if other != name}


def test_jitter_applies_its_operators_in_each_samples_own_order():
    before, after, parameters = render(
        settings(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    )
    operators = [operator for _, _, operator in COLOR_OPERATORS]

    def jitter(image, order, factors):
        for number in order:
            image = operators[number](image, factors[number])
        return image

    torch.testing.assert_close(
        after, each(jitter, before, parameters.order, parameters.factors), atol=5e-4, rtol=0
    )


def test_grayscale_pixels_keep_their_color_whatever_the_hue():
    grayscale = torch.full((4, 3, 8, 8), 90, dtype=torch.uint8)
    before, after, _ = render(
        settings(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5), grayscale, side=8
    )
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda image: image),
        ({"grayscale": 1.0}, lambda image: reference.rgb_to_grayscale(image, 3)),
        ({"solarize": (1.0, 0.0)}, lambda image: reference.solarize(image, 0.5)),
        ({"flip": 1.0, "flip_vertical": 1.0}, lambda image: image.flip(2, 3)),
        ({"blur": (1.0, 0.0), "blur_sigma": (0.01, 1.0)}, lambda image: image),  # of hardly any width
    ],
)
def test_each_operator_equals_torchvisions(changes, expected):
    before, after, _ = render(settings(**changes))
    decided = (before - 0.5).abs() > 1e-4  # rounding decides at solarize's threshold itself
    torch.testing.assert_close(after[decided], expected(before)[decided], atol=1e-4, rtol=0)


def test_blur_equals_torchvisions():
    # 224-pixel sigmas of 2.8 to 14 are 0.4 to 2 in a view of 32.
    views = settings(blur=(1.0, 0.0), blur_sigma=(2.8, 14.0))
    before, after, parameters = render(views)

    def blur(image, sigma):
        return reference.gaussian_blur(image, [17, 17], [sigma, sigma])

    torch.testing.assert_close(after, each(blur, before, parameters.sigma.tolist()), atol=1e-4, rtol=0)


@pytest.fixture
def one_core():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_core")
def test_blur_of_a_large_view_equals_torchvisions():
    # Side 130 is no multiple of the pieces a large picture is blurred in; these sigmas are 1 to 2.5 there.
    views = settings(blur=(1.0, 0.0), blur_sigma=(1.8, 4.3))
    images = pictures(6, side=130)
    parameters = draw(views, count=6, size=(130, 130), side=130)
    (after, _) = make_views(batch_of(images), views.specs(130), mean=NO_MEAN, std=NO_STD, seed=0, epoch=0)
    expected = each(
        lambda image, sigma: reference.gaussian_blur(image, [21, 21], [sigma, sigma]),
        images.float() / 255,
        parameters.sigma.tolist(),
    )
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)


def test_crops_equal_torchvisions_where_nothing_is_downsampled():
    side, crop = 32, 96  # pictures are enlarged, where antialiasing changes nothing
    before, after, parameters = render(settings(crop_scale=(0.2, 0.6), crop_ratio=(0.75, 4 / 3)), side=crop)

    def cut(image, box):
        top, left, height, width = (int(pixels) for pixels in box)
        return reference.resized_crop(image, top, left, height, width, [crop, crop], antialias=True)

    expected = each(cut, before, parameters.boxes)
    # torchvision repeats the crop's own edge, the grid goes on into the picture: half a source pixel.
    edge = int(np.ceil(crop / 2 / np.sqrt(0.2 * 0.75) / side)) + 1
    inner = slice(edge, -edge)
    torch.testing.assert_close(after[..., inner, inner], expected[..., inner, inner], atol=1e-3, rtol=0)


def test_a_crop_of_a_wide_picture_is_cut_in_true_proportions():
    # A picture 64 wide and 32 high: red, green, blue and white quarters from left to right.
    wide = np.zeros((32, 64, 3), dtype=np.uint8)
    for quarter, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]):
        wide[:, 16 * quarter : 16 * (quarter + 1)] = color
    squeezed = np.asarray(Image.fromarray(wide).resize((64, 64), Image.Resampling.BILINEAR))
    images = torch.from_numpy(squeezed.copy()).permute(2, 0, 1).unsqueeze(0).repeat(16, 1, 1, 1)
    _, after, parameters = render(settings(crop_scale=(0.5, 0.5)), images, size=(32, 64))
    for view, (top, left, height, width) in zip(after, parameters.boxes.astype(int), strict=True):
        assert (top, height, width) == (0, 32, 32)
        expected = torch.from_numpy(wide[:, left : left + 32].copy()).permute(2, 0, 1) / 255
        assert (view - expected).abs().mean() < 0.02


@pytest.mark.parametrize("size", [(64, 64), (48, 64), (64, 48)])
def test_crop_distribution_equals_torchvisions(size):
    scale, ratio, count = (0.08, 1.0), (0.75, 4 / 3), 4000
    ours = draw(settings(crop_scale=scale, crop_ratio=ratio), count=count, size=size).boxes
    torch.manual_seed(0)
    blank = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(count)])
    levels = np.linspace(0.05, 0.95, 10)
    for feature, tolerance in (
        (lambda box: box[:, 2] * box[:, 3] / (size[0] * size[1]), 0.03),
        (lambda box: np.log(box[:, 3] / box[:, 2]), 0.03),
        (lambda box: (box[:, 0] + box[:, 2] / 2) / size[0], 0.02),
        (lambda box: (box[:, 1] + box[:, 3] / 2) / size[1], 0.02),
    ):
        np.testing.assert_allclose(
            np.quantile(feature(ours), levels), np.quantile(feature(theirs), levels), atol=tolerance
        )


@pytest.mark.parametrize("size", [(10, 200), (200, 10), (50, 60)])
def test_a_crop_that_never_fits_falls_back_to_torchvisions_central_one(size):
    # Scale 4 is beyond every picture, so all ten attempts fail.
    boxes = draw(settings(crop_scale=(4.0, 4.0), crop_ratio=(0.75, 4 / 3)), count=3, size=size).boxes
    expected = RandomResizedCrop.get_params(torch.empty(3, *size), [4.0, 4.0], [0.75, 4 / 3])
    assert boxes.astype(int).tolist() == [list(expected)] * 3


def test_operators_come_at_their_rates():
    views = Views(
        flip=0.5,
        flip_vertical=0.1,
        jitter=0.8,
        grayscale=0.2,
        blur=(1.0, 0.1),
        solarize=(0.0, 0.2),
        local_count=1,
    )

    def rates(view):
        p = draw(views, count=20_000, view=view)
        return [
            float(who.mean()) for who in (p.flip, p.flip_vertical, p.jitter, p.grayscale, p.blur, p.solarize)
        ]

    assert rates("a") == pytest.approx([0.5, 0.1, 0.8, 0.2, 1.0, 0.0], abs=0.015)
    for view in ("b", "c", "local-0"):
        assert rates(view) == pytest.approx([0.5, 0.1, 0.8, 0.2, 0.1, 0.2], abs=0.015), view


def test_all_24_orders_of_jitter_are_equally_likely():
    order = draw(Views(), count=24_000).order
    counts = np.unique(order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert counts.min() > 850
    assert counts.max() < 1150


def test_blur_scales_with_the_view():
    sigma = draw(Views(blur_sigma=(0.1, 2.0)), count=5000, side=112).sigma
    assert sigma.min() == pytest.approx(0.05, abs=0.01)
    assert sigma.max() == pytest.approx(1.0, abs=0.01)


def test_another_epoch_gives_other_views():
    assert not torch.equal(views_of(Views())[0], views_of(Views(), epoch=1)[0])


def views_of(views, indices=range(8), *, epoch=0, whole=2):
    indices = np.array(indices)
    batch = Batch(indices, pictures(16)[indices], torch.full((len(indices), 2), SIDE, dtype=torch.int32))
    return make_views(batch, views.specs(SIDE, whole=whole), mean=NO_MEAN, std=NO_STD, seed=0, epoch=epoch)


def test_a_samples_views_do_not_depend_on_its_batch():
    whole = views_of(Views(), range(16))
    parts = [views_of(Views(), part) for part in (range(5), range(5, 16))]
    for number in range(2):
        torch.testing.assert_close(
            whole[number], torch.cat([part[number] for part in parts]), atol=1e-5, rtol=0
        )


@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("image_size", [112, 120, 150])
def test_large_views_made_one_after_another_equal_those_made_together(image_size):
    # Sigmas from hardly any blur to one that reaches over half the view.
    views = Views(blur=(1.0, 1.0), blur_sigma=(0.1, 30.0), crop_scale=(0.3, 1.0))
    images = pictures(24, side=100)
    batch = batch_of(images, (90, 130))
    alone = make_views(batch, views.specs(image_size), mean=NO_MEAN, std=NO_STD, seed=0, epoch=0)
    for name, view in zip(("a", "b"), alone, strict=True):
        parameters = draw(views, count=24, size=(90, 130), view=name, side=image_size)
        spec = spec_of(views, name, image_size)
        together = render_view(images.float() / 255, batch.sizes.numpy(), parameters, spec)
        differing = (view - together).abs() > 1e-5
        assert differing.float().mean() < 1e-4  # rounding decides at the threshold of solarize


def test_views_are_normalized_and_leave_the_pictures_alone():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    batch = batch_of(pictures(4))
    before = batch.images.clone()
    view_a, _ = make_views(batch, PLAIN.specs(SIDE), mean=mean, std=std, seed=0, epoch=0)
    expected = reference.normalize(before / 255, list(mean), list(std))
    torch.testing.assert_close(view_a, expected, atol=1e-4, rtol=0)
    assert torch.equal(batch.images, before)


def test_views_are_float32_and_the_same_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = views_of(Views(blur_sigma=(5.0, 9.0)))
    for view, expected in zip(under_autocast, views_of(Views(blur_sigma=(5.0, 9.0))), strict=True):
        assert torch.equal(view, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_a_gpu_equal_those_on_the_cpu():
    batch = batch_of(pictures(16))
    options = {"mean": NO_MEAN, "std": NO_STD, "seed": 0, "epoch": 0}
    on_gpu = make_views(batch._replace(images=batch.images.cuda()), Views().specs(SIDE), **options)
    for cpu, gpu in zip(make_views(batch, Views().specs(SIDE), **options), on_gpu, strict=True):
        differing = (cpu - gpu.cpu()).abs() > 1e-3
        assert differing.float().mean() < 1e-3  # solarize may fall on either side of its threshold


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_a_gpu_wait_for_nothing():
    batch = batch_of(pictures(16))
    batch = batch._replace(images=batch.images.cuda())
    options = {"mean": NO_MEAN, "std": NO_STD, "seed": 0}
    make_views(batch, Views().specs(SIDE), epoch=0, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_views(batch, Views().specs(SIDE), epoch=1, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


LOCAL = Views(local_count=3, local_scale=(0.05, 0.3), local_size=20)


def views_with(local_count, *, whole=2):
    return views_of(LOCAL.model_copy(update={"local_count": local_count}), whole=whole)


def test_further_whole_views_come_before_the_local_ones_and_change_no_other():
    two, four = views_with(1), views_with(1, whole=4)
    assert [tuple(view.shape) for view in four] == [(8, 3, SIDE, SIDE)] * 4 + [(8, 3, 20, 20)]
    assert torch.equal(torch.stack(four[:2]), torch.stack(two[:2]))
    assert torch.equal(four[4], two[2])
    assert len({view.numpy().tobytes() for view in four[:4]}) == 4


def test_views_come_from_any_list_of_specifications_in_its_order():
    specs = [
        ViewSpec(names=("tiny", "tiny-2"), size=8),
        ViewSpec(names=("mirror",), size=SIDE, scale=(1, 1), ratio=(1, 1), flip=1.0),
    ]
    batch = batch_of(pictures(4))
    tiny, other, mirror = make_views(batch, specs, mean=NO_MEAN, std=NO_STD, seed=0, epoch=0)
    assert tiny.shape == other.shape == (4, 3, 8, 8)
    assert not torch.equal(tiny, other)
    torch.testing.assert_close(mirror, batch.images.flip(3) / 255, atol=1e-5, rtol=0)
    (alone,) = make_views(batch, specs[1:], mean=NO_MEAN, std=NO_STD, seed=0, epoch=0)
    assert torch.equal(alone, mirror)


def test_local_views_have_streams_of_their_own():
    """Views of one picture all differ, and none depends on how many there are."""
    none, one, three = (views_with(count) for count in (0, 1, 3))
    for views in (one, three):
        assert torch.equal(views[0], none[0])
        assert torch.equal(views[1], none[1])
    assert torch.equal(one[2], three[2])
    for first, second in itertools.combinations(three[2:], 2):
        assert ((first - second).abs().mean(dim=(1, 2, 3)) > 1e-3).all()


def test_local_crops_have_the_area_asked_for():
    boxes = draw(LOCAL, count=2000, view="local-1", side=20).boxes
    area = boxes[:, 2] * boxes[:, 3] / SIDE**2
    # Whole pixels: a box may be half a pixel larger or smaller in each direction.
    assert 0.03 < area.min() < 0.07
    assert 0.26 < area.max() < 0.34
    assert draw(LOCAL, count=2000, view="b", side=20).boxes[:, 2:].prod(axis=1).max() > 0.9 * SIDE**2


def test_the_grid_shows_pictures_above_their_views(tmp_path):
    batch = batch_of(pictures(4), size=(16, 32))
    options = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    views = make_views(batch, PLAIN.specs(SIDE), seed=0, epoch=0, **options)
    write_views_grid(tmp_path / "views.png", batch, views, **options, count=3)
    with Image.open(tmp_path / "views.png") as page:
        pixels = np.asarray(page)
    assert pixels.shape == (3 * 100 - 4, 3 * 100 - 4, 3)
    assert (pixels[:20, :96] == 255).all()  # a wide picture leaves room above
    np.testing.assert_array_equal(pixels[101:196:3, 1:96:3], pixels[201:296:3, 1:96:3])
    expected = views[0][0].mul(0.2).add(0.5).mul(255).round().permute(1, 2, 0)
    np.testing.assert_allclose(pixels[101:196:3, 1:96:3], expected, atol=1)
