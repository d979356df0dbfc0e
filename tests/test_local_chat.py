"""The assistant whose weights are loaded onto our own devices."""

import tiny_models
import tiny_tokenizers
from tiny_rollouts import count_traces, record_requests
from tiny_steps import config

from cooper_jax.llm import local_chat
from cooper_jax.model import weight_export
from cooper_jax.runtime import device_layouts


def local_assistant(tmp_path, **changes):
    """Random weights as the assistant of the tiny config: (messages of each request, their ids) -> replies."""
    folder = tiny_tokenizers.write(tmp_path / "llama", "llama3")
    model = tiny_models.config(vocab_size=512, width=16, layers=1, head_dim=8)
    params = tiny_models.random_params(model)
    weight_export.save_pretrained(folder.with_name("hf"), model, params, "logits", tokenizer_dir=folder)
    cfg = config(
        **{
            "assistant.kind": "local",
            "assistant.weights": str(tmp_path / "hf"),
            "assistant.max_new_tokens": 5,
        }
        | changes
    )
    asked = local_chat.read_chat_config(cfg, "assistant")
    return local_chat.make_local_generate(cfg, asked, device_layouts.make_policy_layout(cfg), tmp_path)


def test_the_local_assistant_answers_each_request_by_itself(tmp_path):
    """A reply depends on its own row and attempt: not on who else is asked."""
    generate = local_assistant(tmp_path, **{"assistant.top_p": 0.9})
    messages = [[("user", "What is 3 plus 10?")], [("user", "2")], [("user", "The answer is 7.")]]
    together = generate(messages, [(0, 1, row, 0) for row in (7, 8, 9)])
    assert all(c.tokens == 5 if c.truncated else c.tokens <= 5 for c in together)
    alone = generate(messages[1:2], [(0, 1, 8, 0)])
    assert alone == together[1:2]
    others = [generate(messages[1:2], [ids])[0].text for ids in ((0, 1, 8, 1), (0, 2, 8, 0), (0, 1, 5, 0))]
    assert len({together[1].text, *others}) == 4


def test_the_local_assistant_samples_at_its_own_top_p(tmp_path, monkeypatch):
    requests = record_requests(monkeypatch)
    changes = {"assistant.top_p": 0.8125, "assistant.temperature": 0.75, "rollout.top_p": 1.0}
    generate = local_assistant(tmp_path, **changes)
    generate([[("user", "What is 3 plus 10?")]], [(0, 1, 7, 0)])
    assert [(r.spec.top_p, r.spec.temperature) for r in requests] == [(0.8125, 0.75)]


def test_few_programs_answer_batches_of_all_sizes(tmp_path, monkeypatch):
    """Batches of five to eight conversations of up to 64 tokens share a shape; all get the replies of the whole."""
    generate = local_assistant(tmp_path)
    messages = [[("user", "2" * n)] for n in (1, 3, 20, 2, 7, 9, 11, 13)]
    ids = [(0, 1, row, 0) for row in range(8)]
    traces = count_traces(monkeypatch)
    whole = generate(messages, ids)
    compiled = list(traces)
    assert "prefill_prompts" in compiled and "decode_step" in compiled
    for some in (slice(0, 5), slice(2, 8)):
        assert generate(messages[some], ids[some]) == whole[some]
    assert traces == compiled
    for some in (slice(0, 3), slice(4, 5)):
        assert generate(messages[some], ids[some]) == whole[some]


def test_attempts_of_a_conversation_are_samples_of_one_prompt(tmp_path, monkeypatch):
    generate = local_assistant(tmp_path)
    messages = [[("user", "What is 3 plus 10?")], [("user", "2")]]
    asked = [messages[0]] * 4 + [messages[1]] * 4
    ids = [(0, 1, row, attempt) for row in (7, 8) for attempt in range(4, 8)]
    replies = generate(asked, ids)
    assert len({reply.text for reply in replies}) == 8
    # The replies to a conversation are its own, whoever else is asked.
    assert generate(asked[4:], ids[4:]) == replies[4:]

    requests = record_requests(monkeypatch)
    generate(asked, ids)
    [request] = requests
    assert (request.spec.group_size, len(request.prompts), list(request.positions)) == (4, 2, [7, 8])

    # What is not the next attempt of the same conversation is a prompt of its own.
    requests.clear()
    generate([messages[0]] * 3 + [messages[1]], [(0, 1, 7, 0), (0, 1, 7, 2), (0, 1, 8, 3), (0, 1, 8, 4)])
    assert [request.spec.group_size for request in requests] == [1] * len(requests)
    assert sum(len(request.prompts) for request in requests) == 4
