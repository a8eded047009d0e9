"""Version ranges, against the library that defines them for Python packages."""

import itertools

import pytest
from packaging.specifiers import SpecifierSet

from edgecl.onboard.versions import bounds_of, numbers_of, version_fits

VERSIONS = ["8.2", "8.2.1", "9.0", "10.3", "10.3.0", "10.3.0.26", "10.3.1", "10.13.3", "10.30", "11"]
BOUNDS = ["8.2.1", "10", "10.3", "10.3.0", "10.13", "11.0"]


@pytest.mark.parametrize("sign", [">=", "<=", "==", "<", ">"])
def test_each_bound_holds_what_pep_440_says(sign):
    for version, bound in itertools.product(VERSIONS, BOUNDS):
        assert version_fits(version, sign + bound) is SpecifierSet(sign + bound).contains(version), (
            version,
            bound,
        )


@pytest.mark.parametrize("versions", [">=10.3,<10.8", ">=8.2, <8.3", ">=10.13,<12", "", "<11,>10.3"])
def test_a_range_holds_what_all_of_its_bounds_hold(versions):
    for version in VERSIONS:
        assert version_fits(version, versions) is SpecifierSet(versions).contains(version)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("1.31.1+cpu", (1, 31, 1)),
        ("2026.4.1-22982-e213a147257", (2026, 4, 1)),
        ("10.3.0.26", (10, 3, 0, 26)),
        ("anything", ()),
    ],
)
def test_what_a_vendor_appends_to_the_numbers_is_ignored(version, numbers):
    assert numbers_of(version) == numbers


@pytest.mark.parametrize("versions", ["10.3", ">=ten", "~=10.3", ">=10.3;<11", ">=10.3,<11 or so"])
def test_what_is_no_bound_is_named(versions):
    with pytest.raises(ValueError, match="is no bound of versions"):
        bounds_of(versions)
