"""The scorers of reasoning-gym: none of them executes the text it scores, and none scores otherwise for that."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_server.config import VerifierConfig
from feature_server.verifiers.verifiers import Verifier, make_verifier

reasoning_gym = pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")

ROOT = Path(__file__).resolve().parents[2]
EVALUATING = ("spiral_matrix", "binary_matrix", "string_insertion", "n_queens")
READ_BY_SYMPY = (
    *("polynomial_multiplication", "simple_integration", "intermediate_integration"),
    *("countdown", "puzzle24"),
)
ENTRY = {"question": "4 - 1 - 7 =", "answer": "-4", "metadata": {"source_dataset": "chain_sum"}}
MATRIX = {"question": "", "answer": "1 2 3", "metadata": {"source_dataset": "spiral_matrix", "solution": [1, 2, 3]}}


@pytest.fixture(scope="module")
def gym() -> Verifier:
    return make_verifier(VerifierConfig(name="reasoning_gym", timeout_s=60))


def reward(verifier: Verifier, completion: str, entry: object) -> float:
    return verifier(prompt="", completion=completion, answer=json.dumps(entry, default=str))


ATTACKS = (
    "__import__('builtins').__dict__.update(reached=1)",
    "[__import__('builtins').__dict__.update(reached=1)]",
    "[[setattr(__import__('builtins'), 'reached', 1)]]",
    "exec('import builtins; builtins.reached = 1')",
    "(lambda: setattr(__import__('builtins'), 'reached', 1))()",
    'sympify(\'setattr(__import__("builtins"), "reached", 1)\')',
    'sin(\'setattr(__import__("builtins"), "reached", 1)\')',
    "x.__class__.__init__.__globals__['__builtins__'].update(reached=1)",
    "Symbol('x').__class__.__base__.__subclasses__()",
    "lambdify([], '1', modules=[{}])()",
    'S(\'setattr(__import__("builtins"), "reached", 1)\')',
    "preview(x)",
    "open('/etc/passwd').read()",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "exit()",
    "globals()",
    "eval('1')",
    "getattr(x, 'func')",
    "Function('f', eval=1)(2)",
)

SCRIPT = """
import builtins, json, sys
import reasoning_gym
from feature_server.verifiers.reasoning_gym_scorer import score
names, attacks = json.loads(sys.stdin.read())
for name in names:
    for entry in reasoning_gym.create_dataset(name, size=2, seed=0):
        for attack in attacks:
            status, detail = json.loads(score(json.dumps([attack, json.dumps(entry, default=str)]), 0, 0))
            assert not hasattr(builtins, "reached"), (name, attack)
            assert status == "failed" or float(detail) < 0.5, (name, attack, detail)
print("done")
"""


def test_no_scorer_executes_what_it_scores() -> None:
    """Unconfined, in a process whose builtins the attacks would mark."""
    command = [sys.executable, "-c", SCRIPT]
    given = json.dumps([[*EVALUATING, *READ_BY_SYMPY], ATTACKS])
    result = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout.endswith("done\n"), result.stderr


def test_these_attacks_work_on_the_scorers_as_they_are() -> None:
    program = """
import builtins, reasoning_gym
for name, attack in (("spiral_matrix", "[setattr(__import__('builtins'), 'reached', 1)]"),
                     ("puzzle24", "sin('setattr(__import__(\\"builtins\\"), \\"reached\\", 1)')")):
    entry = reasoning_gym.create_dataset(name, size=1, seed=0)[0]
    reasoning_gym.get_score_answer_fn(name)(answer=attack, entry=entry)
    print(vars(builtins).pop("reached"))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout.split() == ["1", "1"], result.stderr


MAY_EXECUTE = ("eval", "exec", "compile", "parse_expr", "sympify", "S", "loads", "system", "__import__")


def evaluated_in_scorers() -> Iterator[tuple[str, str]]:
    """Module and function of every call, within a method that scores, of what may execute its argument."""
    root = Path(reasoning_gym.__file__).parent
    for path in root.rglob("*.py"):
        functions = [f for f in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(f, ast.FunctionDef)]
        for node in [n for function in functions if "score" in function.name for n in ast.walk(function)]:
            if isinstance(node, ast.Call) and ast.unparse(node.func) not in ("json.loads", "re.compile"):
                name = ast.unparse(node.func).rpartition(".")[2]
                if name in MAY_EXECUTE:
                    yield path.stem, name


def test_every_scorer_that_evaluates_is_known() -> None:
    """One that a later version of the package adds is found here. `number_sorting` evaluates its own answer."""
    by_eval = {(module, "eval") for module in (*EVALUATING, "number_sorting")}
    assert set(evaluated_in_scorers()) == by_eval | {(module, "parse_expr") for module in READ_BY_SYMPY}


@pytest.mark.parametrize("name", [*EVALUATING, *READ_BY_SYMPY])
def test_right_answers_score_as_they_do_in_the_package(name: str, gym: Verifier) -> None:
    scorer = reasoning_gym.get_score_answer_fn(name)
    for entry in reasoning_gym.create_dataset(name, size=8, seed=1):
        for answer in (entry["answer"], str(entry["metadata"].get("solution")), "7", "words"):
            if answer is not None:
                assert reward(gym, answer, entry) == scorer(answer=answer, entry=entry), answer


HARMFUL = {
    "redefines the scorer for later answers": "[setattr(__import__('json'), 'loads', lambda *_: 1)]",
    "writes a reply of its own": "[__import__('os').write(d, b'[\"passed\", \"1.0\"]') for d in range(3, 64)]",
    "ends its process": "[__import__('os')._exit(0)]",
    "prints a secret": "[__import__('os').write(2, __import__('os').environ['HF_TOKEN'].encode() * 10**6)]",
    "floods": "[print('x' * 10**6) for _ in range(10**4)]",
    "runs a shell": "[__import__('os').system('touch FOLDER/new')]",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harm_is_scored_0_and_touches_nothing(
    name: str, gym: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert reward(gym, HARMFUL[name].replace("FOLDER", str(tmp_path)), MATRIX) < 0.1
    assert reward(gym, "-4", ENTRY) == 1 and reward(gym, "wrong", ENTRY) < 0.1
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")


def test_tasks_score_their_own_answers(gym: Verifier) -> None:
    assert reward(gym, " -4\n", ENTRY) == 1
    assert reward(gym, "4", ENTRY) < 1
    assert reward(gym, "-4", {"answer": "-4", "source_dataset": "chain_sum"}) == 1


def test_a_scorer_that_raises_gives_0(gym: Verifier) -> None:
    entry = {"answer": "6", "metadata": {"source_dataset": "prime_factorization", "number": 6, "factors": [2, 3]}}
    failed = gym.status_counts["failed"]
    assert reward(gym, "words", entry) == 0
    assert gym.status_counts["failed"] == failed + 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("-4", "must be a reasoning-gym entry as a JSON object, got -4"),
        ("four", "JSONDecodeError"),
        ('{"answer": "-4"}', "names no source_dataset"),
        ('{"answer": "-4", "source_dataset": "no_such_task"}', "'no_such_task' not registered"),
    ],
)
def test_an_answer_that_is_no_entry_ends_the_run(gym: Verifier, answer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym(prompt="", completion="-4", answer=answer)


def test_a_formula_that_takes_for_ever_gives_0() -> None:
    hasty = make_verifier(VerifierConfig(name="reasoning_gym", timeout_s=1.5))
    entry = reasoning_gym.create_dataset("puzzle24", size=1, seed=0)[0]
    assert reward(hasty, "9**9**9**9", entry) < 0.1
    assert set(hasty.status_counts) <= {"timeout", "memory", "failed", "passed"}


def test_the_package_of_tasks_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"pip install reasoning-gym==0\.1\.25"):
        make_verifier(VerifierConfig(name="reasoning_gym"))
