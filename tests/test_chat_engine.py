"""The serving engine: requests that come and go, each with the tokens that a rollout of its own would give."""

import dataclasses
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_few_shapes import CompilationLog
from tiny_rollouts import TINY, one_device, params_of, spec_of

from cooper_jax.configs import base
from cooper_jax.kernels.sampling_rows import make_row_settings
from cooper_jax.model import transformer
from cooper_jax.rollout import engine
from cooper_jax.rollout.rollout_state import RolloutStatic
from cooper_jax.runtime import device_layouts, keys
from cooper_jax.runtime.mesh import make_shardings
from cooper_jax.serving.chat_engine import ChatEngine, EngineSizes, QueueFull, SampleRequest

SPEC = spec_of(group_size=1, max_new_tokens=24, segment=4)
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1},
]


def init_params_of(config, layout):
    """The weights of `params_of` on a layout."""
    params, specs = params_of(config), transformer.param_specs(config)
    return params if layout.single_device else jax.device_put(params, make_shardings(layout, specs))


class Recorder:
    """An engine of four slots, and all that it has delivered."""

    def __init__(self, layout=None, params=None, slots_per_shard=4, implementation="xla", config=TINY):
        layout = layout or one_device()
        params = params or init_params_of(config, layout)
        weights = engine.copy_rollout_weights(params, config, layout, "float32")
        static = RolloutStatic(config, layout, SPEC, implementation)
        self.events = {}
        sizes = EngineSizes(slots_per_shard, max_prompt_tokens=150, max_waiting=50)
        self.engine = ChatEngine(weights, static, sizes, self.record)

    def record(self, events):
        for event in events:
            self.events.setdefault(event.request, []).append(event)

    def run(self):
        while self.engine.step():
            pass

    def tokens(self, request):
        return list(itertools.chain.from_iterable(event.tokens for event in self.events[request]))

    def finish(self, request):
        finishes = [event.finish for event in self.events[request]]
        assert not any(finishes[:-1]), "only the last event ends a request"
        return finishes[-1]


@pytest.fixture(scope="module")
def recorder():
    return Recorder()


def make_request(prompt, limit=24, seed=0, sample=0, **settings):
    return SampleRequest(prompt, limit, seed, sample, make_row_settings(**settings))


def make_requests(count: int, seed: int = 0):
    """Requests of all settings, lengths and limits, some of them several samples of one prompt."""
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        prompt = rng.integers(10, 60, rng.integers(1, 150)).tolist()
        for sample in range(1 + i % 3):
            limit = int(rng.integers(1, SPEC.max_new_tokens + 1))
            settings = i % len(SETTINGS)
            requests.append(make_request(prompt, limit, settings, sample, **SETTINGS[settings]))
    return requests


def assert_as_alone(recorder, requests, config=TINY):
    """Each of the requests, whose seed is the number of its settings, has the tokens and the end of a rollout."""
    for number, settings in enumerate(SETTINGS):
        chosen = [request for request in requests if request.seed == number]
        if not chosen:
            continue
        sampled = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0} | settings
        rollout = engine.generate(
            params_of(config), config, one_device(), [r.prompt for r in chosen], [0] * len(chosen),
            keys.make_key(number, "sampler"),
            spec_of(max_new_tokens=SPEC.max_new_tokens, segment=4, group_size=1, **sampled),
            limits=[r.limit for r in chosen], implementation="xla",
            continued=engine.Continuation([r.sample for r in chosen], [0] * len(chosen)),
        )  # fmt: skip
        for row, request in enumerate(chosen):
            mask = rollout.mask[row]
            assert recorder.tokens(request) == rollout.tokens[row][mask].tolist(), settings
            assert recorder.finish(request) == ("stop" if rollout.finished[row] else "length")
            if not settings:  # the model's own log-probabilities are those of the rollout
                own = np.concatenate([event.logprobs for event in recorder.events[request]])
                np.testing.assert_allclose(own, rollout.logprobs[row][mask], atol=1e-5)


@pytest.mark.slow
def test_each_request_gets_the_tokens_of_a_rollout_of_its_own(recorder):
    """Whatever else is decoded, and whenever it arrives: more requests than slots, in two waves."""
    requests = make_requests(9)
    recorder.engine.submit(requests[:10])
    for _ in range(3):
        recorder.engine.step()
    recorder.engine.submit(requests[10:])
    recorder.run()
    assert_as_alone(recorder, requests)
    assert recorder.engine.busy_slots == recorder.engine.waiting_requests == 0


@pytest.mark.slow
def test_a_cancelled_request_frees_its_slot(recorder):
    """The others go on as if it had not been there."""
    stays, goes, waits, *others = (make_request([20 + i], 24) for i in range(5))
    recorder.engine.submit([stays, goes, *others, waits])
    recorder.engine.step()
    recorder.engine.cancel(goes)
    before = len(recorder.events[goes])
    recorder.run()
    assert len(recorder.events[goes]) == before and recorder.engine.busy_slots == 0
    assert_as_alone(recorder, [stays, waits, *others])

    # One that waits is never started.
    requests = [make_request([30], 24, seed=i) for i in range(6)]
    recorder.engine.submit(requests)
    recorder.engine.cancel(requests[5])
    recorder.run()
    assert requests[5] not in recorder.events and all(recorder.tokens(r) for r in requests[:5])


def test_a_full_queue_refuses(recorder):
    recorder.engine.submit([make_request([30], 2) for _ in range(54)])
    with pytest.raises(QueueFull):
        recorder.engine.submit([make_request([30], 2)])
    recorder.run()
    recorder.engine.submit([make_request([30], 2)])
    recorder.run()


def test_a_failure_between_assignment_and_prefill(monkeypatch):
    """A server that stops answers its requests with an error while the devices' thread prepares them."""
    recorder = Recorder()
    admit = recorder.engine._admit

    def fail_first(*arguments):
        recorder.engine.fail()
        admit(*arguments)

    monkeypatch.setattr(recorder.engine, "_admit", fail_first)
    requests = [make_request([30], 2), make_request([31, 32], 2)]
    recorder.engine.submit(requests)
    recorder.run()
    assert [recorder.finish(request) for request in requests] == ["error", "error"]
    with pytest.raises(RuntimeError):
        recorder.engine.submit([make_request([30], 2)])


@pytest.mark.slow
def test_nothing_is_compiled_after_the_start(monkeypatch):
    """Requests of all lengths, limits and settings, in waves."""
    log = CompilationLog()
    for name in ("jax._src.interpreters.pxla", "jax._src.dispatch"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)
        monkeypatch.setattr(logging.getLogger(name), "handlers", [log])
    jax.clear_caches()
    with jax.log_compiles(True):
        recorder = Recorder()
        assert len(list(recorder.engine.compile_programs())) > 3
        assert log.take()["run_segment"] == 6, "two widths of prompts, three of replies"
        requests = make_requests(30, seed=1)
        for start in range(0, len(requests), 7):
            recorder.engine.submit(requests[start : start + 7])
            recorder.engine.step()
        recorder.engine.cancel(requests[-1])
        recorder.run()
        assert not log.take()
    assert len(recorder.events) >= len(requests) - 1


def test_logits_that_are_not_finite_end_the_engine():
    broken = jax.tree.map(lambda x: x.at[...].set(jnp.nan), params_of())
    recorder = Recorder(params=broken)
    requests = [make_request([30], 4) for _ in range(6)]
    recorder.engine.submit(requests)
    with pytest.raises(FloatingPointError, match="not finite"):
        recorder.engine.step()
    recorder.engine.fail()
    assert [recorder.finish(request) for request in requests] == ["error"] * 6
    with pytest.raises(RuntimeError):
        recorder.engine.submit(requests[:1])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(data=4, fsdp=1, tensor=1), dict(data=1, fsdp=2, tensor=2)])
def test_a_mesh_gives_the_tokens_of_one_device(sizes):
    cfg = base.get_config()
    cfg.mesh.update(**sizes)
    layout = device_layouts.make_layouts(cfg, jax.devices()[:4])["policy"]
    recorder = Recorder(layout, slots_per_shard=2)
    requests = make_requests(8)
    recorder.engine.submit(requests)
    recorder.run()
    assert_as_alone(recorder, requests)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["tpu_interpret", "triton_interpret"])
def test_kernels_give_the_tokens_of_plain_xla(implementation):
    config = dataclasses.replace(TINY, head_dim=64, heads=4, kv_heads=2, ffn=16)
    recorder = Recorder(implementation=implementation, config=config)
    requests = make_requests(3)
    recorder.engine.submit(requests)
    recorder.run()
    assert_as_alone(recorder, requests, config)
