import torch

from isthmus.nn.patch_positions import add_patch_positions, patch_positions


def test_every_patch_of_a_picture_of_any_shape_has_a_position_of_its_own():
    for grid in ((1, 1), (3, 3), (2, 7), (27, 16)):
        for width in (24, 160, 26):
            table = patch_positions(grid, width)
            assert table.shape == (grid[0] * grid[1], width)
            torch.testing.assert_close(table[:, : width // 4 * 4].square().mean(), torch.tensor(1.0))
            apart = torch.cdist(table, table) + torch.eye(len(table))
            assert apart.min() > 0.05


def test_a_position_is_a_row_and_a_column_as_shares_of_the_picture():
    table = patch_positions((4, 2), 32).unflatten(0, (4, 2))
    torch.testing.assert_close(table[:, 0, :16], table[:, 1, :16])  # one row, one first half
    torch.testing.assert_close(table[0, :, 16:], table[3, :, 16:])
    # The middle patch of three stands at half the height, as the middle one of five does.
    torch.testing.assert_close(patch_positions((3, 1), 32)[1], patch_positions((5, 1), 32)[2])


def test_positions_count_alike_behind_encoders_of_unlike_scale():
    x = torch.randn(2, 1 + 6, 32, generator=torch.Generator().manual_seed(0))
    embedded = add_patch_positions(x, (2, 3))
    assert torch.equal(embedded[:, 0], x[:, 0])  # the class token stands nowhere
    torch.testing.assert_close(add_patch_positions(50 * x, (2, 3)), 50 * embedded)
    size = x[:, 1:].square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(embedded[:, 1:] - x[:, 1:], size * patch_positions((2, 3), 32).expand(2, -1, -1))
    assert torch.equal(add_patch_positions(torch.zeros(1, 6, 32), (2, 3)), torch.zeros(1, 6, 32))
