"""Which tests `make check` runs."""

from __future__ import annotations

from .nearest import MOST, REPOSITORY, module_of, nearest


def test_tests_that_import_a_module_are_near_to_it() -> None:
    changed = REPOSITORY / "s2d2_lmeval" / "runtime" / "statistics.py"
    assert module_of(changed) == "s2d2_lmeval.runtime.statistics"
    found = [str(path.relative_to(REPOSITORY)) for path in nearest([changed])]
    assert "tests/runtime/test_statistics.py" in found
    assert found[-1] == "tests/test_house.py"
    assert len(found) <= MOST + 1


def test_a_changed_test_comes_first() -> None:
    changed = REPOSITORY / "tests" / "toy" / "test_tasks.py"
    assert nearest([changed])[0] == changed
    assert module_of(REPOSITORY / "custom_generate" / "sdar.py") == "s2d2_lmeval.custom_generate.sdar"
