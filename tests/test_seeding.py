"""Seeds are 63-bit numbers that depend on every argument and on its place."""

import itertools

import torch

from jepa.seeding import derive_seed, generator

KEYS = list(itertools.product(range(6), range(6), range(6), ("masks", "augment")))


def test_every_combination_of_run_step_rank_and_stream_has_a_seed_of_its_own() -> None:
    assert len({derive_seed(*key) for key in KEYS}) == len(KEYS)


def test_arguments_do_not_run_into_each_other() -> None:
    assert derive_seed(1, 23, 0, "a") != derive_seed(12, 3, 0, "a")
    assert derive_seed(0, 1, 23, "a") != derive_seed(0, 12, 3, "a")
    assert derive_seed(0, 0, 1, "1a") != derive_seed(0, 0, 11, "a")


def test_seeds_fill_63_bits_evenly() -> None:
    """torch and NumPy take that many, and the starts of clips are shares of 2 ** 63."""
    shares = torch.tensor([derive_seed(*key) / 2**63 for key in KEYS], dtype=torch.float64)
    assert 0 <= shares.min() < 0.02
    assert 0.98 < shares.max() < 1
    assert abs(shares.mean() - 0.5) < 0.05
    assert {derive_seed(*key) % 2 for key in KEYS} == {0, 1}


def test_a_generator_starts_from_the_seed_of_the_same_arguments() -> None:
    for key in KEYS[::37]:
        assert generator(*key).initial_seed() == derive_seed(*key)
