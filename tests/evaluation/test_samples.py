"""Samples in order and shuffled, cached or read again, with fields; unreadable samples; stop between batches."""

import pytest
import torch
from torch import Tensor
from toy_model import Crop, Images, seeded

from jepa.data.loader import BrokenSamples
from jepa.data.transforms import EvalTransform
from jepa.encoders.spatial import SpatialEncoder
from jepa.errors import RunError
from jepa.evaluation.samples import Samples, Split
from jepa.evaluation.stems import fit_stems
from jepa.layers.stems import fit_stem
from jepa.seeding import generator
from jepa.types import Sample


def samples_of(dataset, batch_size=4, **options):
    split = Split(dataset=dataset, name="validation", indices=tuple(range(len(dataset))))
    return Samples(split=split, reduce=Crop().pictures, batch_size=batch_size, **options)


def test_images_are_decoded_once_if_they_fit_in_memory_and_batches_stay_the_same():
    for limit, num_read in ((1 << 30, 10), (100, 20)):
        dataset = Images(10)
        samples = samples_of(dataset, max_bytes=limit)
        first, second = (list(samples.batches()) for _ in range(2))
        assert dataset.num_read == num_read
        assert [len(batch.labels) for batch in first] == [4, 4, 2]
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def test_unreadable_samples_are_left_out_and_named_once(caplog):
    samples = samples_of(Images(10, broken=(3, 4)))
    sizes = [len(batch.labels) for _ in range(2) for batch in samples.batches()]
    assert sizes == [3, 3, 2] * 2
    assert [record.message for record in caplog.records] == [
        f"left out: picture {index}: cut short" for index in (3, 4)
    ]


def test_a_sample_that_the_loop_has_named_is_not_named_again(caplog):
    dataset = Images(10, broken=(3, 4))
    BrokenSamples(dataset).add(torch.tensor([3]))
    for _ in range(2):
        list(samples_of(dataset).batches())
    assert [record.message for record in caplog.records] == [
        f"left out: picture {index}: cut short" for index in (3, 4)
    ]


def test_a_split_without_readable_samples_is_an_error_that_names_the_first():
    samples = samples_of(Images(3, broken=(0, 1, 2)), batch_size=2)
    with pytest.raises(RunError, match="no validation sample can be read; the first: picture 0: cut short"):
        list(samples.batches())


def test_shuffled_samples_are_all_samples_in_another_order_each_time():
    for limit in (1 << 30, 0):
        samples = samples_of(Images(10, broken=(3,)), max_bytes=limit)
        ordered = torch.cat([batch.values for batch in samples.batches()])
        rng = seeded()
        passes = [torch.cat([batch.values for batch in samples.shuffled(4, rng)]) for _ in range(2)]
        for shuffled in passes:
            assert sorted(p.sum().item() for p in shuffled) == sorted(p.sum().item() for p in ordered)
        assert not torch.equal(*passes)


def test_cached_and_reread_samples_are_shuffled_alike():
    cached, reread = (samples_of(Images(9), max_bytes=limit) for limit in (1 << 20, 0))
    for _ in range(2):
        for one, two in zip(cached.batches(), reread.batches(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    one, two = (torch.cat([batch.rows for batch in samples.shuffled(2, seeded(3))]) for samples in (cached, reread))
    assert torch.equal(one, two)
    assert one.sort().values.tolist() == list(range(9))


def test_samples_that_are_shuffled_first_are_read_once_if_they_fit_in_memory():
    for limit, num_read in ((1 << 20, 10), (100, 4 + 2 * 10)):  # the first batch shows that they do not fit
        dataset = Images(10)
        samples = samples_of(dataset, max_bytes=limit)
        rng = seeded()
        assert all(sum(len(batch.rows) for batch in samples.shuffled(3, rng)) == 10 for _ in range(2))
        assert dataset.num_read == num_read


def test_fields_stay_with_their_samples():
    class Measured(Images):
        def __getitem__(self, index):
            boxes = torch.full((index % 3, 5), float(index))
            return Sample(*super().__getitem__(index), {"quantities": torch.tensor([float(index)]), "boxes": boxes})

    for limit in (1 << 20, 0):
        samples = samples_of(Measured(10, broken=(3,)), max_bytes=limit, fields=["quantities", "boxes"])
        for batch in (*samples.batches(), *samples.shuffled(4, seeded())):
            assert torch.cat(batch.fields["quantities"]).tolist() == batch.rows.tolist()
            assert [boxes.tolist() for boxes in batch.fields["boxes"]] == [
                [[row] * 5] * (row % 3) for row in batch.rows.tolist()
            ]
        assert samples.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_a_dictionary_is_fitted_on_the_samples_that_can_be_read():
    def encoder():
        torch.manual_seed(0)
        sizes = {"clip_shape": (3, 1, 16, 16), "patch_size": 8, "embed_dim": 8, "depth": 0, "num_heads": 1}
        return SpatialEncoder(**sizes, stem="dictionary", stem_width=4)

    dataset, fitted, expected = Images(9, broken=(2, 5)), encoder(), encoder()
    transform = EvalTransform(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    fit_stems(fitted, dataset, transform, seed=1)
    order = torch.randperm(9, generator=generator(1, 0, 0, "stem samples")).tolist()
    pictures = [transform.pictures([dataset[index][0]]) for index in order if index not in (2, 5)]
    fit_stem(expected, map(transform.normalise, map(Tensor.float, pictures)), 7, generator(1, 0, 0, "stem"))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], tensor, rtol=0, atol=0)
