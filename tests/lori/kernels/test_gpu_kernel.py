"""`add_delta` in Triton against a sum in fp64, on a GPU or else in Triton's interpreter; and its compilation for real devices.

Shapes: T tokens, A bases, R rank, D outputs, S slots.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from lori.kernels import Operands, Route, Term, add_delta, default_kernel, gpu
from lori.kernels.layout import Layout
from tests.bench.bgmv import bgmv
from tests.cases import all_pairs
from tests.compiled import compiled_elsewhere, properties
from tests.interpreter import INTERPRETED, mend
from tests.lori.operands import POPULARITY, Case, assert_close, by_hand, make_case, put, random_b

HAS_GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[3]
DEVICES = [
    pytest.param("cpu", marks=INTERPRETED),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16]
FORMS = {"gather": sys.maxsize, "dense": 1}
"""The `dense_tokens` with which every segment takes one form, if its rank allows that."""
SIZES = [
    (1, 1, 1, 1, 1), (3, 1, 3, 5, 2), (5, 2, 17, 33, 4), (4, 3, 33, 129, 5), (4, 2, 32, 255, 4), (3, 1, 100, 256, 3),
    (4, 2, 32, 300, 6), (2, 1, 32, 576, 4), (3, 2, 300, 300, 3),
]  # fmt: skip
"""T, A, R, D, S: few tokens, since Triton interprets."""
NUM_TERMS = {"identical": 1, "zipf": 4}


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    mend(monkeypatch)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Return the device of the tensors."""
    return str(request.param)


@pytest.fixture(params=FORMS)
def dense_tokens(request: pytest.FixtureRequest) -> int:
    """Return the minimum length of dense segments, once for each form of the kernel."""
    return FORMS[request.param]


def check(case: Case, dense_tokens: int | None) -> None:
    """Assert that the kernel adds the deltas (fp32: within 1e-5 of the magnitudes, bf16: rounded once), and nothing else."""
    exact, magnitude = by_hand(case)
    gpu.add_delta(case.y, case.s, case.operands, case.route, dense_tokens)
    assert_close(case.y, exact, magnitude)
    case.assert_nothing_else_is_written()


KERNELS = [*product(DTYPES, FORMS)]
CASES = product(SIZES, POPULARITY, KERNELS) if HAS_GPU else all_pairs(SIZES, [*POPULARITY], KERNELS)


@pytest.mark.parametrize(("sizes", "popularity", "dtype", "form"), [(*case, *kernel) for *case, kernel in CASES])
def test_the_kernel_adds_the_same_as_the_sum_in_fp64(
    sizes: tuple[int, int, int, int, int], popularity: str, dtype: torch.dtype, form: str, device: str
) -> None:
    check(make_case(sizes, dtype, popularity, NUM_TERMS.get(popularity, 2), device), FORMS[form])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [2, 128, 256, 257])
def test_a_dense_b_is_added(rank: int, dtype: torch.dtype, dense_tokens: int, device: str) -> None:
    check(make_case((2, 1, rank, 20, 1), dtype, "uniform", 2, device, densities=[1.0]), dense_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_rank_is_added(dtype: torch.dtype, device: str) -> None:
    check(make_case((2, 2, 2048, 20, 2), dtype, "uniform", 2, device, densities=[0.1, 1.0]), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_segments_are_dense_in_tiles_and_the_others_are_gathered(dtype: torch.dtype, device: str) -> None:
    case = make_case((170, 2, 5, 33, 3), dtype, "uniform", 2, device)
    terms = [Term(1, 31, 0, 0.5), Term(31, 131, 1, -1.0), Term(40, 131, 0, 2.0), Term(133, 165, 2, 1.0), Term(169, 170, 0, 1.0)]
    case = replace(case, terms=tuple(terms))
    check(case, None)
    plan = case.route.gpu["plan"]
    assert isinstance(plan, gpu.Plan)
    assert plan.tiles.tolist() == [[40, 104, 2, 4], [104, 131, 2, 4], [133, 165, 4, 5]]
    assert plan.gather_tokens[:, 0].tolist() == [*range(1, 40), 169]


def test_the_plan_of_a_route_is_made_once(device: str) -> None:
    case = make_case((40, 1, 3, 5, 2), torch.float32, "uniform", 2, device)
    check(case, None)
    plan = case.route.gpu["plan"]
    check(case, None)
    assert case.route.gpu["plan"] is plan


def test_a_plan_gives_each_token_its_terms(device: str) -> None:
    route = Route.from_terms([Term(1, 4, 5, 1.0), Term(3, 4, 2, 1.0), Term(6, 8, 1, 1.0)], 9, device)
    tokens = gpu.make_plan(route).tokens
    assert [row[0] for row in tokens.tolist()] == list(range(9))
    assert [last - first for _, first, last in tokens.tolist()] == [0, 1, 1, 2, 0, 0, 1, 1, 0]
    assert [tokens[token, 1].item() for token in (1, 2, 3, 6, 7)] == [0, 0, 1, 3, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_route_by_token_follows_the_contents_of_its_arrays(dtype: torch.dtype, device: str) -> None:
    """So a step can be captured: the plan depends on the arrays' contents only, and no array's shape on the number of terms."""
    case = make_case((40, 2, 5, 33, 3), dtype, "uniform", 2, device)
    before, segments = case.y.clone(), torch.zeros(40, 4, dtype=torch.int32, device=device)
    slots, weights = torch.zeros(90, dtype=torch.int32, device=device), torch.full((90,), torch.nan, device=device)
    for terms in (
        [],
        [Term(3, 4, 1, 2.0), Term(39, 40, 0, 1.0), Term(39, 40, 2, -1.0)],
        [Term(t, t + 1, t % 3, 0.5) for t in range(40)],
    ):
        case.y.copy_(before)
        by_token = [[term for term in terms if term.start == t] for t in range(40)]
        ends = [sum(map(len, by_token[: t + 1])) for t in range(40)]
        segments.copy_(torch.tensor([[t, t + 1, ends[t] - len(by_token[t]), ends[t]] for t in range(40)]))
        slots[: ends[-1]] = torch.tensor([term.slot for own_terms in by_token for term in own_terms], dtype=torch.int32)
        weights[: ends[-1]] = torch.tensor([term.weight for own_terms in by_token for term in own_terms])
        case = replace(case, terms=tuple(terms))
        exact, magnitude = by_hand(case)
        route = Route.by_token(segments, slots, weights)
        gpu.add_delta(case.y, case.s, case.operands, route)
        assert_close(case.y, exact, magnitude)
        plan = route.gpu["plan"]
        assert isinstance(plan, gpu.Plan)
        assert plan.tokens.shape == (40, 3)
        assert not len(plan.tiles)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_without_a_delta_keep_every_bit(dtype: torch.dtype, dense_tokens: int, device: str) -> None:
    operands = Operands(2, 3, 300, dtype, device)
    only = torch.zeros(300, 3)
    only[299, 1] = 1.0
    put(operands, 0, only)  # slot 1 and the first window are empty
    y = torch.full((4, 300), -0.0, dtype=dtype, device=device)
    s = torch.ones(4, 1, 3, dtype=dtype, device=device)
    route = Route.from_terms([Term(0, 1, 0, 2.0), Term(2, 4, 1, 1.0)], 4, device)
    gpu.add_delta(y, s, operands, route, dense_tokens)
    unchanged = torch.ones(4, 300, dtype=torch.bool)
    unchanged[0, 256:] = False
    assert y[unchanged].signbit().all()
    assert not y[unchanged].any()
    assert y[0, 256:].tolist() == [0.0] * 43 + [2.0]


def test_a_route_without_terms_changes_nothing(dense_tokens: int, device: str) -> None:
    case = make_case((3, 1, 3, 5, 2), torch.float32, "uniform", 2, device)
    before = case.y.clone()
    gpu.add_delta(case.y, case.s, case.operands, Route.from_terms([], 3, device), dense_tokens)
    gpu.add_delta(case.y[:0], case.s[:0], case.operands, Route.from_terms([], 0, device), dense_tokens)
    assert torch.equal(case.y, before)


def test_weights_of_opposite_sign_cancel(dense_tokens: int, device: str) -> None:
    operands = Operands(2, 4, 7, torch.bfloat16, device)
    for slot in range(2):
        put(operands, slot, torch.ones(7, 4))
    y = torch.full((3, 7), 1.5, dtype=torch.bfloat16, device=device)
    s = torch.ones(3, 1, 4, dtype=torch.bfloat16, device=device)
    gpu.add_delta(y, s, operands, Route.from_terms([Term(0, 3, 0, 0.75), Term(0, 3, 1, -0.75)], 3, device), dense_tokens)
    assert y.eq(1.5).all()


@pytest.mark.parametrize(
    ("before", "rank", "num_slots", "after"),
    [
        (256.0, 64, 16, 1280.0),  # a sum in bf16 stops at 256, since 256 + 1 rounds to 256
        (256.0, 1, 4, 260.0),  # so does y if it is rounded after each term
        (-256.0, 257, 1, 1.0),  # a delta of 257 rounds to 256 if it is rounded before it is added
    ],
)
def test_bf16_is_summed_in_fp32_and_rounded_once(
    before: float, rank: int, num_slots: int, after: float, dense_tokens: int, device: str
) -> None:
    operands = Operands(num_slots, rank, 5, torch.bfloat16, device)
    for slot in range(num_slots):
        put(operands, slot, torch.ones(5, rank))
    y = torch.full((2, 5), before, dtype=torch.bfloat16, device=device)
    s = torch.ones(2, 1, rank, dtype=torch.bfloat16, device=device)
    gpu.add_delta(y, s, operands, Route.from_terms([Term(0, 2, slot, 1.0) for slot in range(num_slots)], 2, device), dense_tokens)
    assert y.eq(after).all()


def test_s_and_operands_are_not_changed(dense_tokens: int, device: str) -> None:
    case = make_case((3, 2, 5, 33, 4), torch.float32, "uniform", 2, device)
    s, pool = case.s.clone(), case.operands.pool.clone()
    check(case, dense_tokens)
    assert torch.equal(case.s, s)
    assert torch.equal(case.operands.pool, pool)


def test_an_adapter_put_later_is_read_from_the_current_pool(dense_tokens: int, device: str) -> None:
    case = make_case((3, 1, 5, 33, 2), torch.float32, "uniform", 2, device)
    check(case, dense_tokens)
    b = [case.b[0], random_b(33, 5, 1.0, torch.Generator().manual_seed(1))]
    put(case.operands, 1, b[1])
    check(replace(case, b=b), dense_tokens)


@pytest.mark.parametrize(
    "change",
    [
        lambda y, s: (y.double(), s),
        lambda y, s: (y, s.bfloat16()),
        lambda y, s: (y[:, :-1], s),
        lambda y, s: (y, s[:, :, :-1]),
        lambda y, s: (y[:-1], s),
        lambda y, s: (y, s[:, :1]),
        lambda y, s: (y[:-1], s[:-1]),
        lambda y, s: (y.T.contiguous().T, s),
        lambda y, s: (y, s.mT.contiguous().mT),
        lambda y, s: (y.to("meta"), s),
    ],
)
def test_tensors_unlike_the_operands_are_refused(
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]], device: str
) -> None:
    case = make_case((3, 2, 5, 33, 4), torch.float32, "uniform", 2, device)
    before = case.y.clone()
    with pytest.raises(ValueError, match=r"expected \(3, 33\) and \(3, 2 or more, 5\), both torch.float32 on"):
        gpu.add_delta(*change(case.y, case.s), case.operands, case.route)
    assert torch.equal(case.y, before)


def test_a_route_of_several_layers_is_refused(device: str) -> None:
    case = make_case((3, 2, 5, 33, 4), torch.float32, "uniform", 2, device)
    route = Route.from_terms([Term(0, 3, 0, (1.0, 2.0))], 3, device)
    with pytest.raises(ValueError, match=r"expected .* the route of one layer"):
        gpu.add_delta(case.y, case.s, case.operands, route)
    twice = case.y.clone()
    gpu.add_delta(twice, case.s, case.operands, Route.from_terms([Term(0, 3, 0, 2.0)], 3, device))
    gpu.add_delta(case.y, case.s, case.operands, route.layer_route(1))
    assert torch.equal(case.y, twice)


def test_the_dispatch_knows_the_kernel(device: str) -> None:
    case, same = (make_case((3, 2, 5, 33, 4), torch.float32, "uniform", 2, device) for _ in range(2))
    add_delta(case.y, case.s, case.operands, case.route, kernel="gpu")
    gpu.add_delta(same.y, same.s, same.operands, same.route)
    assert torch.equal(case.y, same.y)
    assert default_kernel(torch.device("cuda")) == "gpu"


def test_the_dense_kernel_that_the_benchmark_compares_with_is_right(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    y, s, pool = (torch.randn(*shape, generator=g).to(device) for shape in ((3, 200), (3, 16), (4, 16, 200)))
    slots = torch.tensor([[0, 3], [2, 2], [1, 0]], dtype=torch.int32, device=device)
    expected = y + 0.5 * torch.einsum("tr,tmrd->td", s, pool[slots.long()])
    bgmv(y, s, pool, slots, 0.5)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_step_reads_the_routes_arrays_at_replay(dtype: torch.dtype) -> None:
    case = make_case((4, 1, 32, 300, 3), dtype, "uniform", 2, "cuda", densities=[0.1])
    check(case, None)  # compiles
    before = case.y.clone()
    captured = Route.from_terms([Term(t, t + 1, 0, 1.0) for t in range(4)], 4, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.add_delta(case.y, case.s, case.operands, captured)
    then = Route.from_terms([Term(t, t + 1, 1 + t % 2, -0.5) for t in range(4)], 4, "cuda")
    for array, other in ((captured.segments, then.segments), (captured.slots, then.slots), (captured.weights, then.weights)):
        array.copy_(other)
    graph.replay()
    replayed = case.y.clone()
    case.y.copy_(before)
    gpu.add_delta(case.y, case.s, case.operands, then)
    assert torch.equal(replayed, case.y)


# --- code for real devices, made without one


def compile_ahead(form: str, capability: int) -> dict[str, object]:
    """Compile a form for both dtypes at R = 32 and two D, and return properties of the code. Triton must not interpret."""
    options = {"gather": gpu.GATHER_OPTIONS, "dense": gpu.DENSE_OPTIONS}[form]
    compiled: dict[str, object] = {}
    for dtype, num_outputs in product(DTYPES, (576, 4096)):
        layout = Layout(num_outputs, 32, dtype)
        kernel = getattr(gpu, form)
        width, rows = gpu.dense_sizes(layout)
        constants = {
            "num_outputs": num_outputs,
            "rank": 32,
            "step_bytes": layout.step_bytes,
            "width": width,
            "rows": rows,
            "tokens": gpu.TILE,
        }
        value = "*bf16" if dtype is torch.bfloat16 else "*fp32"
        types = {"p_y": value, "p_s": value, "p_pool": "*u8", "p_weights": "*fp32", "y_stride": "i32", "s_stride": "i32"}
        code = properties(kernel, constants, types, "*i32", capability, options)
        compiled[f"{form} {layout.dtype_name} {num_outputs} {capability}"] = code
    return compiled


@pytest.mark.slow
def test_the_kernels_compile_for_real_devices(tmp_path: Path) -> None:
    code = " | ".join(f"compile_ahead('{form}', {capability})" for form, capability in product(FORMS, (80, 90)))
    compiled = compiled_elsewhere("tests.lori.kernels.test_gpu_kernel", code, tmp_path)
    assert len(compiled) == 16
    assert all(code["is_elf"] and code["shared"] <= 48 << 10 for code in compiled.values())
    multiplying = {name for name, code in compiled.items() if code["multiplies_matrices"]}
    assert multiplying == {f"dense bfloat16 {size} {capability}" for size, capability in product((576, 4096), (80, 90))}
