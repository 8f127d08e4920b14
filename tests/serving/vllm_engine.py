"""Greedy tokens by vLLM, run by its own interpreter: a request is read as JSON and the tokens go to its file."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # vLLM starts processes that import this file
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    request = json.load(sys.stdin)
    model = LLM(
        request["model"], dtype="float32", enable_lora=True, max_lora_rank=request["rank"], max_loras=1,
        max_model_len=1024, enforce_eager=True,
    )  # fmt: skip
    outputs = model.generate(
        [{"prompt_token_ids": prompt} for prompt in request["prompts"]],
        SamplingParams(temperature=0.0, max_tokens=request["tokens"], ignore_eos=True),
        lora_request=LoRARequest("adapter", 1, request["adapter"]),
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    Path(request["output"]).write_text(json.dumps(tokens))
