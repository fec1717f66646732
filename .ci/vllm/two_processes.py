"""`two_processes.py CHECKPOINT N`: N scene questions through vLLM with tensor_parallel_size=2; prints one JSON line."""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine here, its two workers in processes of their own
}


def main(checkpoint: str, count: int) -> None:
    """ToDRE at 0.25, whose pivot needs the vision tower's CLS row."""
    from vllm import LLM, SamplingParams

    import vtc_tinyvlm

    llm = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        seed=0,
        max_model_len=512,
        max_num_seqs=16,
        tensor_parallel_size=2,
        num_gpu_blocks_override=128,
        hf_overrides={
            "architectures": ["VTCLlavaForConditionalGeneration"],
            "vtc": {"method": "todre", "keep": 0.25},
        },
    )
    asked = vtc_tinyvlm.evaluation_questions(count)
    prompts = [{"prompt": q.prompt, "multi_modal_data": {"image": q.image}} for q in asked]
    done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3, logprobs=1), use_tqdm=False)
    outputs = [o.outputs[0] for o in done]
    print(json.dumps([(list(o.token_ids), o.logprobs[0][o.token_ids[0]].logprob) for o in outputs]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
