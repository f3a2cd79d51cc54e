"""Augmentation: ClassMix against plain loops, geometry, coins drawn once per batch, repeatability."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from train.augment import STRONG, WEAK, AugmentConfig, augment, class_mix, scale_and_crop

IGNORE, CLASSES = 255, 7
OFF = AugmentConfig(flip=0.0)


def batch(size: int = 4, height: int = 24, width: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (size, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE
    images = torch.rand(size, 3, height, width, generator=generator)
    return images, labels, torch.rand(labels.shape, generator=generator)


def run(data, config: AugmentConfig, **options):
    images, labels, confidence = data
    return augment(images, labels, confidence, config, ignore_index=IGNORE, num_classes=CLASSES, **options)


# --- ClassMix ---------------------------------------------------------------------------------------------------------


def candidates(labels: Tensor, background: int | None) -> list[int]:
    """Classes of one label map that may be pasted, as the rule is written: drop each only if others remain."""
    classes = sorted(set(labels.flatten().tolist()))
    for dropped in (IGNORE, background):
        if dropped in classes and len(classes) > 1:
            classes.remove(dropped)
    return classes


@pytest.mark.parametrize("background", [None, 0])
def test_class_mix_against_loops(background):
    """Find out which classes were pasted, then rebuild the result pixel by pixel."""
    images, labels, confidence = batch(5, 9, 8)
    labels[1] = labels[1] % 3  # three classes
    labels[2] = 4  # one class
    labels[3] = IGNORE  # nothing but ignored pixels
    labels[4] = torch.where(labels[4] < 3, 0, IGNORE)  # background and ignored pixels
    counts_seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed_images, mixed_labels, mixed_confidence = class_mix(
            images, labels, confidence, ignore_index=IGNORE, num_classes=CLASSES, background=background
        )
        for k in range(5):
            j = (k + 1) % 5
            allowed = candidates(labels[j], background)
            pasted = {
                int(labels[j, y, x])
                for y in range(9)
                for x in range(8)
                if mixed_confidence[k, y, x] == confidence[j, y, x]
            }
            assert pasted <= set(allowed)
            assert len(pasted) == min(len(allowed), len(allowed) // 2 + 1)
            counts_seen.add((len(allowed), len(pasted)))
            for y in range(9):
                for x in range(8):
                    source = j if int(labels[j, y, x]) in pasted else k
                    assert mixed_labels[k, y, x] == labels[source, y, x]
                    assert mixed_confidence[k, y, x] == confidence[source, y, x]
                    assert torch.equal(mixed_images[k, :, y, x], images[source, :, y, x])
    # (classes that may be pasted, classes pasted)
    assert counts_seen == ({(7, 4), (3, 2), (1, 1)} if background is None else {(6, 4), (2, 2), (1, 1)})


def test_class_mix_by_hand():
    """Partner has classes 1 and 2 (both pasted); the other partner has 0, 3, ignored (two classes: both pasted)."""
    labels = torch.tensor([[[0, 3], [IGNORE, 3]], [[1, 1], [2, IGNORE]]])
    images = torch.arange(24.0).view(2, 3, 2, 2)
    mixed_images, mixed_labels, nothing = class_mix(images, labels, None, ignore_index=IGNORE, num_classes=CLASSES)
    assert nothing is None
    assert mixed_labels.tolist() == [[[1, 1], [2, 3]], [[0, 3], [2, 3]]]
    assert mixed_images[:, 0].tolist() == [[[12, 13], [14, 3]], [[0, 1], [14, 3]]]


def test_class_mix_chooses_evenly():
    """Of 5 classes 3 are pasted: each in 60 % of the draws."""
    labels = torch.arange(5).view(1, 1, 5).repeat(2, 1, 1)
    images = torch.zeros(2, 3, 1, 5)
    images[1] = 1.0
    torch.manual_seed(0)
    pasted = torch.zeros(5)
    for _ in range(600):
        mixed, _, _ = class_mix(images, labels, None, ignore_index=IGNORE, num_classes=CLASSES)
        assert mixed[0, 0].sum() == 3
        pasted += mixed[0, 0, 0]
    assert (pasted / 600 - 0.6).abs().max() < 0.08


def test_class_mix_drops_the_background_only_where_others_remain():
    labels = torch.tensor([[[0, 0]], [[0, 1]]])
    images = torch.zeros(2, 3, 1, 2)
    images[1] = 1.0
    mixed, mixed_labels, _ = class_mix(images, labels, None, ignore_index=IGNORE, num_classes=CLASSES, background=0)
    assert mixed[0, 0].tolist() == [[0, 1]] and mixed_labels[0].tolist() == [[0, 1]]
    assert mixed[1, 0].tolist() == [[0, 0]] and mixed_labels[1].tolist() == [[0, 0]]


# --- scale and crop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.75, 0.8, 1.3, 1.75])
@pytest.mark.parametrize("size", [(32, 32), (24, 33)])
def test_scale_keeps_image_labels_and_confidence_aligned(factor, size):
    """Left half class 1, upper half class +2, the class written into image and confidence: they agree off the edges."""
    height, width = size
    labels = torch.zeros(2, height, width, dtype=torch.int64)
    labels[:, :, : width // 2] += 1
    labels[:, : height // 2] += 2
    value = (labels + 1) / 8
    images = value.unsqueeze(1).repeat(1, 3, 1, 1)
    torch.manual_seed(int(100 * factor))
    for _ in range(10):
        new_images, new_labels, confidence = scale_and_crop(images, labels, value, factor=factor, ignore_index=IGNORE)
        assert new_images.shape == images.shape and new_labels.shape == labels.shape == confidence.shape
        assert new_labels.dtype == torch.int64
        expected = torch.where(new_labels == IGNORE, 0.0, (new_labels + 1) / 8)
        for found in (new_images[:, 0], confidence):
            wrong = ((found - expected).abs() > 0.07).float().mean()
            # bilinear mixing blurs a band at the two edges: at most 2 pixels wide each
            assert wrong <= 2 * (1 / height + 1 / width)
            edge = (found - expected).abs()[:, 0, 0]
            assert (edge < 1e-5).all()
        assert torch.equal(new_labels[0], new_labels[1])


def test_shrinking_pads_in_the_centre_with_odd_pixels_right_and_on_top():
    images, labels, confidence = torch.ones(1, 3, 10, 11), torch.ones(1, 10, 11).long(), torch.ones(1, 10, 11)
    # 10 -> 7 rows: 3 to pad, 2 on top and 1 below; 11 -> 8 columns: 3 to pad, 1 left and 2 right
    new_images, new_labels, new_confidence = scale_and_crop(
        images, labels, confidence, factor=0.77, ignore_index=IGNORE
    )
    expected = torch.zeros(10, 11)
    expected[2:9, 1:9] = 1
    assert torch.equal(new_labels[0] == 1, expected == 1) and (new_labels[0][expected == 0] == IGNORE).all()
    assert torch.allclose(new_confidence[0], expected) and torch.allclose(new_images[0, 1], expected)


def test_resizing_does_not_shift_anything():
    """Resizing the mirrored maps gives the mirrored result, for labels too: both are aligned at the centre."""
    data = batch(2, 33, 33)  # 33 -> 26 pixels: no pixel centre of the result falls between two pixels
    resized = scale_and_crop(*data, factor=0.79, ignore_index=IGNORE)
    mirrored = scale_and_crop(*(tensor.flip(-1, -2) for tensor in data), factor=0.79, ignore_index=IGNORE)
    for one, other in zip(resized, mirrored, strict=True):
        inner = (..., slice(4, 30), slice(3, 29))
        assert torch.allclose(one[inner], other[inner].flip(-1, -2), atol=1e-6)


def test_growing_crops_everywhere_at_one_place_per_batch():
    """Doubled, the labels are pairs of equal pixels; the crop is found by its first label."""
    height, width = 6, 5
    labels = torch.arange(height * width).view(1, height, width).repeat(3, 1, 1)
    images = torch.rand(3, 3, height, width)
    corners = set()
    torch.manual_seed(0)
    for _ in range(200):
        _, cropped, _ = scale_and_crop(images, labels, None, factor=2.0, ignore_index=IGNORE)
        assert torch.equal(cropped[0], cropped[1]) and torch.equal(cropped[0], cropped[2])
        doubled = labels[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
        places = [
            (top, left)
            for top in range(height + 1)
            for left in range(width + 1)
            if torch.equal(doubled[top : top + height, left : left + width], cropped[0])
        ]
        assert len(places) == 1
        corners.add(places[0])
    assert corners == {(top, left) for top in range(height + 1) for left in range(width + 1)}


def test_a_scale_without_effect_returns_the_tensors():
    data = batch()
    assert all(a is b for a, b in zip(scale_and_crop(*data, factor=1.01, ignore_index=IGNORE), data, strict=True))


# --- the whole --------------------------------------------------------------------------------------------------------


def test_nothing_drawn_returns_the_tensors_given():
    data = batch()
    assert all(a is b for a, b in zip(run(data, OFF), data, strict=True))
    assert run((*data[:2], None), OFF)[2] is None


def test_flip_takes_all_three():
    data = batch()
    for flipped, given in zip(run(data, AugmentConfig(flip=1.0)), data, strict=True):
        assert torch.equal(flipped, given.flip(-1))


@pytest.mark.parametrize("step", ["jitter", "blur"])
def test_colour_steps_change_the_image_only(step):
    images, labels, confidence = batch()
    torch.manual_seed(0)
    changed, same_labels, same_confidence = run((images, labels, confidence), AugmentConfig(flip=0.0, **{step: 1.0}))
    assert same_labels is labels and same_confidence is confidence
    assert changed.shape == images.shape and not torch.equal(changed, images)
    assert changed.min() >= 0 and changed.max() <= 1


def test_jitter_draws_per_image_and_blur_per_batch():
    image = batch(1)[0].repeat(3, 1, 1, 1)
    labels = torch.zeros(3, 24, 20, dtype=torch.int64)
    torch.manual_seed(0)
    jittered, _, _ = run((image, labels, None), AugmentConfig(flip=0.0, jitter=1.0))
    assert not torch.allclose(jittered[0], jittered[1], atol=1e-3)
    blurred, _, _ = run((image, labels, None), AugmentConfig(flip=0.0, blur=1.0))
    assert torch.allclose(blurred[0], blurred[1])


def test_jitter_strength_bounds_brightness_and_hue_keeps_grey():
    """On a grey image contrast, saturation and hue do nothing: what is left is a brightness factor of 1 +- s."""
    grey = torch.full((200, 3, 4, 4), 0.5)
    labels = torch.zeros(200, 4, 4, dtype=torch.int64)
    torch.manual_seed(0)
    for strength in (WEAK.jitter_strength, STRONG.jitter_strength):
        jittered, _, _ = run((grey, labels, None), AugmentConfig(flip=0.0, jitter=1.0, jitter_strength=strength))
        factor = jittered.mean((1, 2, 3)) / 0.5
        assert 1 - strength - 1e-3 <= factor.min() < 1 - 0.9 * strength
        assert 1 + 0.9 * strength < factor.max() <= 1 + strength + 1e-3


def test_horizontal_blur_leaves_columns_nearly_alone():
    """By the larger sigma across and the smaller one down, as kornia 0.4.1 takes the range of the authors."""
    impulse = torch.zeros(1, 3, 33, 33)
    impulse[..., 16, 16] = 1
    blurred, _, _ = run((impulse, torch.zeros(1, 33, 33).long(), None), AugmentConfig(blur=1.0, blur_horizontally=True))
    across, down = blurred[0, 0, 16], blurred[0, 0, :, 16]
    positions = torch.arange(33.0) - 16
    bell = torch.exp(-positions.square() / (2 * 1.5**2))
    assert torch.allclose(across, bell / bell[5:28].sum() * (positions.abs() <= 11), atol=1e-6)
    assert torch.allclose(down, across[16] * (positions == 0), atol=1e-6)


def test_blur_of_fixed_sigma_is_that_of_torchvision():
    data = batch(2, 40, 40)
    blurred, _, _ = run(data, AugmentConfig(flip=0.0, blur=1.0, blur_sigma=(1.2, 1.2)))
    assert torch.allclose(blurred, F.gaussian_blur(data[0], [23, 23], [1.2, 1.2]), atol=1e-6)
    small = batch(2, 8, 6)
    assert run(small, AugmentConfig(flip=0.0, blur=1.0))[0].shape == small[0].shape


def test_class_mix_can_be_switched_off():
    data = batch()
    config = AugmentConfig(classmix=1.0, flip=0.0)
    assert run(data, config, classmix=False)[0] is data[0]
    assert not torch.equal(run(data, config)[0], data[0])


def test_order_of_the_steps():
    """All geometric steps at once equal ClassMix, then scale, then flip, from the same random state."""
    data = batch()
    config = AugmentConfig(classmix=1.0, scale=1.0, scale_range=(1.5, 1.5), flip=1.0)
    torch.manual_seed(3)
    found = run(data, config)
    torch.manual_seed(3)
    torch.rand(())
    expected = class_mix(*data, ignore_index=IGNORE, num_classes=CLASSES)
    torch.rand(()), torch.empty(()).uniform_(1.5, 1.5)
    expected = scale_and_crop(*expected, factor=1.5, ignore_index=IGNORE)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b.flip(-1))


def test_coins_fall_once_per_batch_at_their_probability():
    """Either every image of the batch is flipped or none; the share of flipped batches is the probability."""
    images, labels, _ = batch(4, 4, 4)
    flips = 0
    torch.manual_seed(0)
    for _ in range(400):
        new_images, _, _ = run((images, labels, None), AugmentConfig(flip=0.3))
        flipped = torch.equal(new_images, images.flip(-1))
        assert flipped or new_images is images
        flips += flipped
    assert 0.22 < flips / 400 < 0.38


def test_same_random_state_repeats_the_augmentation_and_inputs_stay():
    data = batch()
    copies = [tensor.clone() for tensor in data]
    torch.manual_seed(1)
    torch.rand(17)
    state = torch.get_rng_state()
    config = AugmentConfig(classmix=1.0, flip=0.5, scale=1.0, jitter=1.0, blur=1.0)
    first = run(data, config)
    second = run(data, config)
    torch.set_rng_state(state)
    again = run(data, config)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(data, copies, strict=True))


def test_defaults_are_those_of_the_authors_code():
    assert (WEAK.classmix, WEAK.flip, WEAK.scale, WEAK.jitter, WEAK.blur) == (0.2, 0.5, 0.5, 0.2, 0.0)
    assert (STRONG.classmix, STRONG.flip, STRONG.scale, STRONG.jitter, STRONG.blur) == (0.75, 0.5, 0.8, 0.8, 0.2)
    assert (WEAK.jitter_strength, STRONG.jitter_strength) == (0.125, 0.25)
    for config in (WEAK, STRONG):
        assert config.scale_range == (0.75, 1.75) and config.blur_sigma == (0.1, 1.5) and config.blur_kernel == 23


def test_no_gradient_is_recorded():
    images, labels, confidence = batch()
    assert not run((images.requires_grad_(), labels, confidence), AugmentConfig(flip=1.0, scale=1.0))[0].requires_grad


def test_hue_of_bgr_images_turns_the_other_way():
    """So the released jitter of BGR images has the distribution of that of RGB images: its range is symmetric."""
    image = torch.rand(3, 9, 9)
    for turn in (-0.08, 0.03):
        swapped = F.adjust_hue(image.flip(0), turn).flip(0)
        torch.testing.assert_close(swapped, F.adjust_hue(image, -turn), rtol=0, atol=1e-5)
