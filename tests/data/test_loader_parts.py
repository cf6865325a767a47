"""Which part of a mixture a sample is of."""

import torch

from jepa.data.loader import batches


class Plain:
    """No mixture."""

    classes, channels, mean, std = (), 3, (0.5,) * 3, (0.5,) * 3

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 1, 4, 4), index, dtype=torch.uint8), index

    def describe(self, index: int) -> str:
        return f"number {index}"

    def validation(self) -> None:
        return None


def test_every_sample_of_a_plain_data_set_is_of_part_zero() -> None:
    stream = batches(Plain(), batch_size=6, seed=0, num_workers=0)
    assert next(stream).parts.tolist() == [0] * 6
    stream.close()
