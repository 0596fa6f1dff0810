"""An adapter in memory."""

from lori.adapter import Adapter
from lori.basis import Seeded
from tests.lori.adapters import make_adapter, make_config, make_modules


def test_the_version_is_the_first_digits_of_the_content_digest() -> None:
    digest = "0123456789abcdef" * 4
    assert Adapter("a", make_config(content_digest=digest), {}, Seeded()).version == "0123456789ab"


def test_the_basis_is_the_one_that_the_config_names() -> None:
    assert make_adapter("a", basis=Seeded(seed=9, stream=4)).basis == Seeded(seed=9, stream=4)


def test_nnz_counts_over_all_modules() -> None:
    modules = make_modules()
    expected = sum(int(b.mask.sum()) for b in modules.values())
    assert len(modules) > 1
    assert Adapter("a", make_config(), modules, Seeded()).nnz == expected
