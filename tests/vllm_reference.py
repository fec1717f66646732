"""What vLLM is compared with, the same questions through transformers and `vtc.patch`; and the environment it gets."""

import torch

import vtc

QUESTIONS = 204
SURROUNDINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
"""Environment variables for every engine: small, and quiet."""


def cut(ids, eos):
    ids = ids.tolist()
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def answer(model, inputs, new=3):
    """Greedy ids behind the prompt, and the log-probability of the first."""
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    eos = model.generation_config.eos_token_id
    first = out.logits[0].log_softmax(-1)
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    return [(cut(row, eos), float(first[i, row[0]])) for i, row in enumerate(ids)]


def reference(package, questions, method, positions="original", size=34):
    """The same questions through transformers: answers, and the keep-set of each image."""
    model, processor = package.load()
    answers, kept = [], []
    for at in range(0, len(questions), size):
        some = questions[at : at + size]
        texts, images = [q.prompt for q in some], [q.image for q in some]
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
        with vtc.patch(model, method, positions=positions) as handle:
            answers += answer(model, inputs)
        kept += [index.tolist() for sample in handle.last_keep for index in sample]
    return answers, kept


def agree(ours, theirs, tolerance=2e-3):
    """The same ids, and nearly the same log-probabilities."""
    other = [
        f"{i}: {a[0]} here, {b[0]} there" for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a[0] != b[0]
    ]
    assert not other, f"{len(other)} of {len(ours)} answers differ: {other[:3]}"
    assert differ(ours, theirs) < tolerance, f"log-probabilities differ by up to {differ(ours, theirs)}"


def same_sets(ours, theirs):
    """vLLM encodes an image once for all prompts, in an order of its own."""
    return set(map(tuple, ours)) == set(map(tuple, theirs))


def differ(ours, theirs):
    """By how much log-probabilities differ at most."""
    return max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
