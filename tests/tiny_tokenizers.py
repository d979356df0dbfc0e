"""Small byte-level BPE tokenizers in the manner of Qwen 2.5, Llama 3 and Llama 2, trained in a second."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    f"What is {a} plus {a + 7}? The answer is {2 * a + 7}, so we put it within \\boxed{{{2 * a + 7}}}.\n\n"
    "system user assistant <question> </question> <completion> final reference_answer"
    for a in range(40)
]
WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # in Qwen's manner
)
QWEN_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date_string }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def write(directory: Path, family: str, template: bool = True) -> Path:
    """A Hugging Face directory with a tokenizer of `family`: qwen, llama3 or llama2."""
    special = {
        "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "llama3": [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        "llama2": ["<s>", "</s>"],
    }[family]
    backend = Tokenizer(models.BPE(byte_fallback=family == "llama2"))
    if family == "llama2":
        # A space before the first word of a text, and before no other segment.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = sorted(set("".join(CORPUS)) | {"\u2581", *map(chr, range(33, 127))})
        trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if family == "qwen":  # control tokens that are not flagged special, and one that is no control token
        tags = ["<tool_call>", "</tool_call>", "<think>", "</think>", "   "]
        backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    bos = special[0] if family != "qwen" else None
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": {"qwen": "<|im_end|>", "llama3": "<|end_of_text|>", "llama2": "</s>"}[family],
        "pad_token": "<|endoftext|>" if family == "qwen" else None,
        "chat_template": {"qwen": QWEN_TEMPLATE, "llama3": LLAMA_TEMPLATE, "llama2": None}[family]
        if template
        else None,
    }
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {k: v for k, v in config.items() if v is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
