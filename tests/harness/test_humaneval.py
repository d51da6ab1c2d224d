"""Documents of HumanEval's shapes pass with their own solutions and with no others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "task_configs" / "humaneval" / "utils.py"
spec = importlib.util.spec_from_file_location("humaneval_utils_of_a_test", PATH)
assert spec is not None
assert spec.loader is not None
utils = importlib.util.module_from_spec(spec)
spec.loader.exec_module(utils)

METADATA = "\n\nMETADATA = {\n    'author': 'jt',\n    'dataset': 'test'\n}\n\n\n"
# name, prompt, solution, tests: what the benchmark's tests do beyond `assert candidate(…) == …`
DOCUMENTS: dict[str, tuple[str, str, str, str]] = {
    "lists of tuples, floats, truth": (
        "pairs",
        'from typing import List, Tuple\n\n\ndef pairs(x: List[int]) -> List[Tuple[int, float]]:\n    """Halves."""\n',
        "    return [(n, n / 2) for n in x]\n",
        """
    assert candidate([1, 2]) == [(1, 0.5), (2, 1.0)]
    assert not candidate([])
    assert abs(candidate([3])[0][1] - 1.5) < 1e-6
    assert candidate([0]) == [(0, 0)], 'zero'
""",
    ),
    "a helper of the prompt, copies, random numbers": (
        "root",
        'import math\n\n\ndef line(a, x):\n    return a[0] + a[1] * x\n\n\ndef root(a: list):\n    """Zero."""\n',
        "    assert line(a, 0) == a[0]\n    return -a[0] / a[1]\n",
        """
    import math
    import random
    rng = random.Random(42)
    import copy
    for _ in range(100):
        a = [rng.randint(-9, 9), rng.randint(1, 9)]
        assert math.fabs(line(a, candidate(copy.deepcopy(a)))) < 1e-4
""",
    ),
    "the function by its own name": (
        "thirds",
        'def thirds(x: list):\n    """Every third."""\n',
        "    return x[::3]\n",
        """
    assert tuple(candidate([1, 2, 3])) == tuple(thirds([1, 2, 3]))
    assert tuple(candidate([5, 6, 7, 8])) == tuple([5, 8])
""",
    ),
    "an argument that is used again, and prints": (
        "total",
        'def total(x):\n    """Sum."""\n',
        "    print(x)\n    return sum(x)\n",
        """
    print
    x = list(range(-99, 100, 2))
    s = sum(x)
    assert candidate(x) == s
    print('done')
    assert candidate([1]) == 1, 'one'
    assert True
""",
    ),
    "types, texts, dictionaries, None": (
        "kinds",
        'def kinds(x):\n    """Kinds."""\n',
        "    return {'a': x, 'b': (None, True, 'é')} if x else None\n",
        """
    assert candidate(1) == {'a': 1, 'b': (None, True, 'é')}
    assert type(candidate(2)['b']) is tuple
    assert candidate(0) is None
    assert candidate(2)['b'][1] is True
""",
    ),
}


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    name, prompt, solution, tests = DOCUMENTS[request.param]
    return {
        "entry_point": name,
        "prompt": prompt,
        "canonical_solution": solution,
        "test": f"{METADATA}def check(candidate):{tests}",
    }


def test_solutions_pass(document: dict[str, Any]) -> None:
    solution = document["canonical_solution"]
    assert utils.passes(document, solution)
    assert utils.passes(document, f"<think>\nIs it `x`?\n</think>\n```python\n{document['prompt']}{solution}```")


@pytest.mark.parametrize(
    "body", ["pass", "return 0", "return x", "raise SystemExit", "exit()", "return check(lambda *_: 1)"]
)
def test_others_do_not(document: dict[str, Any], body: str) -> None:
    assert not utils.passes(document, f"    {body}\n")
