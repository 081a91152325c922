"""The map: each module of the package, and the tests that fail when it breaks.

    python -m pytest tests/test_map.py -s

`tests/unit/` mirrors the package: `cache/disk.py` is tested by `unit/cache/test_disk.py`, or by several
files that begin so. What only shows in a call, a process or a model has a line in `ELSEWHERE`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "dspy_resilient"

# Module: the file that tests it, and a word by which that file names what it tests.
ELSEWHERE = {
    "__main__": ("unit/cli/test_cli.py", '"-m", "dspy_resilient"'),
    "_support/canonical": ("unit/targets/test_request_key.py", "stand_in"),
    "_support/closable": ("behaviour/test_clients.py", "with "),
    "_support/deliverer": ("unit/test_events.py", "deliverer"),
    "_support/fork": ("integration/test_processes.py", "fork"),
    "_support/loop_close": ("behaviour/test_stranded.py", "loop_close"),
    "_support/turns": ("unit/test_events.py", "turns"),
    "_support/wait_queue": ("model/test_gate_model.py", "enlist"),
    "budgets/budget": ("behaviour/test_budgets.py", "Budget"),
    "budgets/ledger": ("model/test_budget_model.py", "Ledger"),
    "budgets/meter": ("model/test_budget_model.py", "Meter"),
    "circuit/machine": ("model/test_circuit_model.py", "CircuitHalfOpened"),
    "circuit/permit": ("model/test_circuit_model.py", "Permit"),
    "circuit/state": ("unit/circuit/test_breaker.py", "CircuitState"),
    "circuit/window": ("unit/circuit/test_breaker.py", "window"),
    "cli/check": ("unit/cli/test_cli.py", '"check"'),
    "cli/real_demo": ("unit/demo/test_demo.py", "real"),
    "cli/stored": ("unit/cli/test_cli.py", '"cache"'),
    "clients": ("behaviour/test_clients.py", "Clients"),
    "demo/board": ("unit/demo/test_demo.py", "LiveBoard"),
    "demo/scenarios": ("unit/demo/test_demo.py", "SCENARIOS"),
    "demo/side": ("unit/demo/test_demo.py", "Side"),
    "evaluation": ("behaviour/test_evaluation.py", "Evaluate"),
    "limits/bulkhead": ("unit/limits/test_limiter_adaptive.py", "adaptive"),
    "limits/slot": ("model/test_limits_model.py", "release"),
    "lm/copies": ("behaviour/test_saving.py", "copy"),
    "lm/entry": ("behaviour/test_calls.py", "acall"),
    "lm/history": ("behaviour/parity/test_parity_hits.py", "history"),
    "lm/mlflow_span": ("integration/test_tracing.py", "mlflow"),
    "lm/options": ("unit/test_policies.py", "ResilientLM"),
    "lm/resilient_lm": ("behaviour/parity/test_parity_class.py", "ResilientLM"),
    "lm/saving": ("behaviour/test_saving.py", "dump_state"),
    "observe/metrics": ("integration/test_prometheus.py", "ClientCollector"),
    "observe/otel": ("integration/test_otel.py", "instrument"),
    "observe/prometheus": ("integration/test_prometheus.py", "ClientCollector"),
    "outcomes/broken_state": ("unit/targets/test_supervisor.py", "BrokenStateError"),
    "outcomes/causes": ("unit/outcomes/test_classify.py", "Causes"),
    "outcomes/outcome": ("unit/outcomes/test_classify.py", "Outcome"),
    "pipeline/admission": ("model/test_call_model.py", "complete"),
    "pipeline/attempt": ("behaviour/test_calls.py", "attempt"),
    "pipeline/call": ("model/test_call_model.py", "complete"),
    "pipeline/client": ("model/test_call_model.py", "ClientState"),
    "pipeline/drivers": ("behaviour/test_cache.py", "pipeline.drivers"),
    "pipeline/failures": ("behaviour/test_fallbacks.py", "AllTargetsFailedError"),
    "pipeline/health": ("behaviour/test_clients.py", "health"),
    "pipeline/in_flight": ("behaviour/test_stranded.py", "in_flight"),
    "pipeline/options": ("behaviour/test_saving.py", "shared"),
    "pipeline/spending": ("behaviour/test_budgets.py", "BudgetExceededError"),
    "pipeline/state": ("model/test_call_model.py", "pipeline.state"),
    "pipeline/twin": ("behaviour/parity/test_parity_programs.py", "adapter"),
    "pipeline/waiting": ("behaviour/test_outages.py", "max_wait"),
    "providers/callback": ("integration/test_observer.py", "callback"),
    "providers/callback_event": ("integration/test_observer.py", "callback_event"),
    "providers/clients": ("integration/test_pool.py", "async_client"),
    "providers/endpoint": ("model/test_places_fuzz.py", "resolve"),
    "providers/environment": ("behaviour/test_tenants.py", "setenv"),
    "providers/http_close": ("integration/test_connections.py", "close"),
    "providers/litellm_module": ("unit/test_imports.py", "litellm"),
    "providers/loop_end": ("integration/test_connections.py", "loop"),
    "providers/make": ("integration/test_pool.py", "timeout"),
    "providers/observer": ("integration/test_observer.py", "watch"),
    "providers/pool": ("model/test_pool_model.py", "HttpClients"),
    "providers/prices": ("behaviour/test_spending.py", "dollars"),
    "providers/wire": ("behaviour/test_failed_generations.py", "not done"),
    "providers/service": ("integration/test_observer.py", "Service"),
    "shared/answers": ("shared/test_shared_cache.py", "CachePolicy"),
    "shared/circuit": ("shared/test_shared_circuit.py", "circuit"),
    "shared/gate": ("shared/test_shared_gate.py", "gate"),
    "shared/ledger": ("model/test_shared_budget_model.py", "SharedLedger"),
    "shared/link": ("shared/test_faults.py", "StoreLost"),
    "shared/memory": ("shared/test_store_model.py", "MemoryStore"),
    "shared/rates": ("shared/test_shared_rates.py", "SharedRates"),
    "shared/redis": ("shared/test_store_model.py", "RedisStore"),
    "shared/redis_scripts": ("shared/test_store_model.py", "RedisStore"),
    "shared/shared_state": ("shared/test_fleet.py", "shared="),
    "shared/store": ("shared/test_store_model.py", "Report"),
    "stats/latency": ("unit/stats/test_stats.py", "Latency"),
    "stats/spending": ("behaviour/test_spending.py", "Spending"),
    "targets/fallbacks": ("behaviour/test_fallbacks.py", "fallbacks="),
    "targets/protocols": ("unit/test_imports.py", "test_imports_point_one_way"),
    "targets/reasoning_models": ("behaviour/test_reasoning_fallbacks.py", "is_reasoning"),
    "targets/route": ("behaviour/test_tenants.py", "circuits"),
    "targets/typed_requests": ("behaviour/test_typed_calls.py", "Request"),
    "testing/answers": ("unit/testing/test_dspy.py", "dspy_answers"),
    "testing/clock": ("unit/testing/test_provider.py", "Clock"),
    "testing/dialects/anthropic": ("unit/testing/test_dialects.py", "anthropic"),
    "testing/dialects/base": ("unit/testing/test_dialects.py", "dialect"),
    "testing/dialects/cohere": ("unit/testing/test_dialects.py", "cohere"),
    "testing/dialects/gemini": ("unit/testing/test_dialects.py", "gemini"),
    "testing/dialects/ollama": ("unit/testing/test_dialects.py", "ollama"),
    "testing/dialects/openai": ("unit/testing/test_dialects.py", "openai"),
    "testing/exchange": ("unit/testing/test_provider.py", "requests"),
    "testing/faults": ("unit/testing/test_provider.py", "rate_limited"),
    "testing/fixtures": ("integration/test_fixtures.py", "make_lm"),
    "testing/reply": ("unit/testing/test_provider.py", "Reply"),
    "testing/server": ("unit/testing/test_provider.py", "Provider"),
    "testing/wire": ("unit/testing/test_provider.py", "http"),
}
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def mirrors(module):
    """Return the unit tests that stand where `module` does."""
    where = TESTS / "unit" / module
    return sorted(
        each
        for each in where.parent.glob(f"test_{where.name}*.py")
        if each.stem == f"test_{where.name}" or each.stem.startswith(f"test_{where.name}_")
    )


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_tests(module):
    """A new module comes with a test file, or with a line above that says what tests it."""
    found = mirrors(module)
    if module in ELSEWHERE:
        name, word = ELSEWHERE[module]
        assert word in (TESTS / name).read_text(), f"{name} says nothing of {word!r}"
        found.append(TESTS / name)
    print(f"{module:32} {', '.join(str(each.relative_to(TESTS)) for each in found)}")
    assert found, f"{module} has no tests"


def test_the_table_names_no_module_that_is_gone():
    """And none that has its own file of unit tests by now."""
    assert ELSEWHERE.keys() <= set(MODULES)
    assert not [module for module in ELSEWHERE if mirrors(module)]
