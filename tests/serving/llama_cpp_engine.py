"""Greedy tokens by llama.cpp, run by its own interpreter: a request is read as JSON and the tokens are printed."""

import itertools
import json
import sys

from llama_cpp import Llama

request = json.load(sys.stdin)
model = Llama(request["model"], lora_path=request["adapter"], n_ctx=1024, n_threads=1, verbose=False)
print(
    json.dumps(
        [
            list(itertools.islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), request["tokens"]))
            for prompt in request["prompts"]
        ]
    )
)
