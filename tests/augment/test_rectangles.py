import pytest
import torch

from galago.augment.rectangles import around, filled, within


def test_inside_is_what_a_loop_over_pixels_finds() -> None:
    torch.manual_seed(0)
    for height, width in ((5, 9), (8, 8), (1, 3)):
        corners = torch.randint(0, 10, (20, 4))
        box = torch.stack([corners[:, :2].amin(1), corners[:, :2].amax(1), corners[:, 2], corners[:, 3]], 1)
        found = within(box, height, width)
        for number, (top, bottom, left, right) in enumerate(box.tolist()):
            for row in range(height):
                for column in range(width):
                    inside = top <= row < bottom and left <= column < right
                    assert found[number, row, column].item() == inside


def test_rectangles_never_leave_the_image() -> None:
    torch.manual_seed(0)
    center_y, center_x = torch.randint(6, (200,)), torch.randint(11, (200,))
    box = around(6, 11, torch.randint(9, (200,)), torch.randint(9, (200,)), center_y, center_x)
    assert (box >= 0).all()
    assert (box[:, :2] <= 6).all()
    assert (box[:, 2:] <= 11).all()
    assert (box[:, 0] <= box[:, 1]).all()
    assert (box[:, 2] <= box[:, 3]).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 5, 3, 4, 6), (2, 4, 6)])
def test_filling_reaches_every_channel_and_frame_and_leaves_the_given_image_alone(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    before = image.clone()
    found = filled(image, torch.tensor([[1, 3, 0, 6], [0, 0, 0, 6]]), torch.tensor(-1.0))
    assert torch.equal(image, before)
    assert (found[0, ..., 1:3, :] == -1).all()
    assert torch.equal(found[0, ..., :1, :], image[0, ..., :1, :])
    assert torch.equal(found[0, ..., 3:, :], image[0, ..., 3:, :])
    assert torch.equal(found[1], image[1])
