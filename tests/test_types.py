"""Optional attributes of a data set, read with their defaults."""

from jepa.types import DatasetTraits


class Plain:
    """Says nothing of itself."""


class Folder:
    labels = (0, 1, -1)
    in_memory = True

    def source(self, index):
        return index // 2


def test_what_a_data_set_does_not_say_has_its_default():
    found = DatasetTraits.of(Plain())
    assert found == DatasetTraits()
    assert (found.labels, found.in_memory, found.num_frames, found.source(7), found.test()) == (None, False, 1, 7, None)


def test_what_a_data_set_says_holds():
    found = DatasetTraits.of(Folder())
    assert (found.labels, found.in_memory, found.num_frames, found.source(7)) == ((0, 1, -1), True, 1, 3)
